"""torch's Adam in Megatron is fused, even after loading state from an unfused run."""

import copy
from types import SimpleNamespace

import pytest
import torch

from megatron_smlp.megatron_patches import torch_adam


def _model() -> torch.nn.Module:
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(33, 17), torch.nn.LayerNorm(17))


def _steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for number in range(count):
        torch.manual_seed(number)
        model(torch.randn(5, 33)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
def test_it_takes_the_steps_of_the_plain_one(kind: type[torch.optim.Adam]) -> None:
    plain, fused = _model(), _model()
    slow = kind(plain.parameters(), lr=1e-2, weight_decay=0.1, foreach=False)
    fast = kind(fused.parameters(), lr=1e-2, weight_decay=0.1)
    torch_adam.fuse_steps(SimpleNamespace(chained_optimizers=[SimpleNamespace(optimizer=fast)]))
    _steps(plain, slow, 4)
    _steps(fused, fast, 4)
    assert fast.param_groups[0]["fused"]

    # A checkpoint brings the flags of the run that saved it.
    fast.load_state_dict(copy.deepcopy(slow.state_dict()))
    fused.load_state_dict(plain.state_dict())
    assert not fast.param_groups[0]["fused"]
    _steps(plain, slow, 3)
    _steps(fused, fast, 3)
    assert fast.param_groups[0]["fused"]
    for ours, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_step_counts_are_where_their_parameters_are() -> None:
    """A checkpoint leaves them on the CPU, where CUDA's fused kernel cannot read them."""
    parameter = torch.nn.Parameter(torch.ones(3, device="meta"))
    optimizer = torch.optim.AdamW([parameter], lr=1e-2)
    torch_adam.allocate(optimizer)
    assert optimizer.state[parameter]["step"].device.type == "meta"
    optimizer.state[parameter]["step"] = torch.tensor(4.0)
    torch_adam._choose_fused(optimizer)
    assert optimizer.state[parameter]["step"].device.type == "meta"
