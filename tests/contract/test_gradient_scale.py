"""Our scaling of tensor lists gives Megatron's results, bit for bit, and is what Megatron calls."""

import pytest
import torch
from megatron.core.optimizer import clip_grads, optimizer
from megatron.core.utils import local_multi_tensor_scale

from megatron_smlp.megatron_patches import gradient_scale
from megatron_smlp.platform import cpu

NO_OP = torch.zeros(1, dtype=torch.int)


@pytest.mark.parametrize("factor", [0.37, 1.0, torch.tensor(0.37)])
@pytest.mark.parametrize("target_dtype", [torch.float32, torch.bfloat16])
def test_it_equals_megatrons(factor: float | torch.Tensor, target_dtype: torch.dtype) -> None:
    sources = [torch.randn(7, 5), torch.randn(3)]
    ours, theirs = ([torch.empty_like(s, dtype=target_dtype) for s in sources] for _ in range(2))
    gradient_scale.scale(1, NO_OP, [sources, ours], factor)
    local_multi_tensor_scale(1, NO_OP, [sources, theirs], factor)
    for our, their in zip(ours, theirs, strict=True):
        assert torch.equal(our, their)


def test_sources_may_be_the_targets() -> None:
    tensors = [torch.randn(4, 4), torch.randn(2)]
    expected = [tensor * 0.25 for tensor in tensors]
    gradient_scale.scale(1, NO_OP, [tensors, tensors], 0.25)
    assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))


def test_megatron_calls_it() -> None:
    cpu.apply()
    gradient_scale.apply()
    if clip_grads.multi_tensor_applier.__name__ != "local_multi_tensor_applier":
        pytest.skip("Apex or Transformer Engine is installed, and used")
    parameter = torch.nn.Parameter(torch.ones(8))
    parameter.main_grad = parameter.grad = torch.full((8,), 3.0)
    pointer = parameter.grad.data_ptr()
    clip_grads.clip_grad_by_total_norm_fp32([parameter], max_norm=1.0, total_norm=2.0)
    assert clip_grads.multi_tensor_scale_impl is gradient_scale.scale
    assert optimizer.multi_tensor_scale_impl is gradient_scale.scale
    assert parameter.grad.data_ptr() == pointer
    torch.testing.assert_close(parameter.grad, torch.full((8,), 1.5), rtol=1e-5, atol=0)
