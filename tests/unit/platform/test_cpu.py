"""The replaced names of the CPU platform do what CUDA's do."""

from argparse import Namespace

import pytest
import torch

from megatron_smlp.platform import cpu

pytestmark = pytest.mark.skipif(not cpu.needed(), reason="there is a CUDA device")


@pytest.fixture(scope="module", autouse=True)
def applied() -> None:
    cpu.apply()


@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda", 1)])
def test_tensors_for_cuda_are_made_on_the_cpu(device: str | torch.device):
    made = [
        torch.zeros(2, device=device),
        torch.empty(2, device=device, pin_memory=True),
        torch.tensor([1.0, 2.0], device=device),
        torch.ones(2, device=device),
        torch.empty_like(torch.zeros(2), device=device),
        torch.zeros(2).to(device),
        torch.zeros(2).to(device=device, dtype=torch.bfloat16),
        torch.nn.Linear(2, 2).to(device).weight,
    ]
    assert {tensor.device.type for tensor in made} == {"cpu"}
    assert made[6].dtype is torch.bfloat16


def test_type_names_are_those_that_the_optimizer_compares_with():
    """`tensor.type() == 'torch.cuda.FloatTensor'` and so on; conversion by type still works."""
    for dtype, name in [(torch.float32, "Float"), (torch.bfloat16, "BFloat16")]:
        assert torch.zeros(1, dtype=dtype).type() == f"torch.cuda.{name}Tensor"
    assert torch.zeros(1).type(torch.float64).dtype is torch.float64
    assert torch.zeros(1, dtype=torch.int64).type() == "torch.LongTensor"


def test_the_device_generator_is_the_one_that_dropout_draws_from():
    torch.cuda.manual_seed(11)
    state = torch.cuda.get_rng_state()
    first = torch.nn.functional.dropout(torch.ones(64))
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.nn.functional.dropout(torch.ones(64)), first)
    torch.manual_seed(11)
    assert torch.equal(torch.nn.functional.dropout(torch.ones(64)), first)


class TestFlags:
    def test_where_cuda_is_available_flags_stay(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        args = Namespace(fp16=True, distributed_backend="nccl")
        cpu.set_flags(args)
        assert vars(args) == {"fp16": True, "distributed_backend": "nccl"}
