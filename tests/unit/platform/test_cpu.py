"""The replaced names of the CPU platform do what CUDA's do."""

import multiprocessing
import os
from argparse import Namespace
from datetime import timedelta
from pathlib import Path

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
        torch.arange(2, device=device),
        torch.ones_like(torch.zeros(2), device=device),
        torch.zeros(2).new_empty(2, device=device),
        torch.zeros(2).to(device),
        torch.zeros(2).to(device=device, dtype=torch.bfloat16),
        torch.nn.Linear(2, 2).to(device).weight,
    ]
    assert {tensor.device.type for tensor in made} == {"cpu"}
    assert made[7].dtype is torch.bfloat16


def test_cuda_of_a_tensor_or_a_module_is_itself():
    tensor, module = torch.zeros(2), torch.nn.Linear(2, 2)
    assert tensor.cuda(non_blocking=True) is tensor
    assert module.cuda(0) is module


def test_other_devices_and_arguments_go_through():
    assert torch.zeros(2, device="meta").device.type == "meta"
    assert torch.zeros(2).to("meta").device.type == "meta"
    assert torch.tensor([1], dtype=torch.int16).dtype is torch.int16


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


def test_streams_and_events_keep_order_and_time():
    stream = torch.cuda.current_stream()
    with torch.cuda.stream(torch.cuda.Stream()):
        start = torch.cuda.Event(enable_timing=True)
        start.record()
    end = stream.record_event()
    stream.wait_event(end)
    torch.cuda.synchronize()
    assert end.query()
    assert start.elapsed_time(end) == (end.seconds - start.seconds) * 1e3 >= 0


def test_the_device():
    assert torch.cuda.current_device() == torch.device("cpu")
    assert torch.cuda.device_count() == 1
    assert torch.cuda.memory_allocated() == 0
    assert not torch.cuda.is_available()


def test_split_sizes_become_numpy():
    """gloo's all-to-all refuses tensors as split sizes."""
    from megatron.core.transformer.moe import token_dispatcher

    sizes = token_dispatcher.maybe_move_tensor_to_cpu(torch.tensor([1, 2]), as_numpy=True)
    assert sizes.tolist() == [1, 2]
    assert not torch.is_tensor(sizes)
    assert torch.is_tensor(token_dispatcher.maybe_move_tensor_to_cpu(torch.tensor([1, 2])))


class TestFlags:
    def test_they_are_set(self):
        args = Namespace(**dict.fromkeys(cpu.FLAGS))
        cpu.set_flags(args)
        assert vars(args) == cpu.FLAGS

    @pytest.mark.parametrize("name", ["fp16", "fp8", "tp_comm_overlap"])
    def test_what_needs_a_gpu_is_refused(self, name: str):
        flag = "--" + name.replace("_", "-")
        with pytest.raises(ValueError, match=f"{flag} needs a CUDA device and none was found"):
            cpu.check_flags(Namespace(**{name: True}))

    def test_where_cuda_is_available_flags_stay(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        args = Namespace(fp16=True, distributed_backend="nccl")
        cpu.set_flags(args)
        assert vars(args) == {"fp16": True, "distributed_backend": "nccl"}


def _gloo_threads() -> int:
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    return names.count("gloo_tcp_loop\n")


def _sums_in_groups(rank: int, folder: Path) -> None:
    """Sum ranks in three groups of two processes, and write what that gave and took."""
    timeout = timedelta(seconds=60)
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=2, timeout=timeout
    )
    groups = [torch.distributed.new_group([0, 1], timeout=timeout) for _ in range(3)]
    sums = [torch.tensor(rank + 1) for _ in groups]
    for total, group in zip(sums, groups, strict=True):
        torch.distributed.all_reduce(total, group=group)
    numbers = [*(int(total) for total in sums), _gloo_threads()]
    (folder / f"{rank}").write_text(" ".join(map(str, numbers)))


def test_groups_share_one_gloo_device_and_a_fork_has_its_own(tmp_path: Path):
    cpu._gloo_devices(os.getpid())  # whose thread the forks do not have
    forks = multiprocessing.get_context("fork")
    processes = [forks.Process(target=_sums_in_groups, args=(r, tmp_path)) for r in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [(tmp_path / str(rank)).read_text() for rank in (0, 1)] == ["3 3 3 1", "3 3 3 1"]


def test_gloo_uses_the_interfaces_that_are_named(monkeypatch: pytest.MonkeyPatch):
    """The launchers name one: without it, machines would look for each other on their own loops."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,lo")
    make = cpu._gloo_devices.__wrapped__  # keeps none for this process
    assert len(make(os.getpid())) == 2
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "none-such")
    with pytest.raises(RuntimeError, match="none-such"):
        make(os.getpid())
