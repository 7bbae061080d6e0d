"""Our operators on lists of tensors match Megatron's bit for bit, and Megatron calls them.

That they are few is held by the device budget (tests/cuda_without_a_gpu).
"""

from __future__ import annotations

import pytest
import torch
from megatron.core.optimizer import clip_grads, optimizer
from megatron.core.utils import (
    local_multi_tensor_applier,
    local_multi_tensor_l2_norm,
    local_multi_tensor_scale,
)
from megatron.training.utils import common_utils

from megatron_smlp.megatron_patches import tensor_lists
from megatron_smlp.platform import cpu

NO_OP = torch.zeros(1, dtype=torch.int)
DTYPES = [torch.float32, torch.bfloat16]


def tensors(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    shapes = [(7, 5), (3,), (), (129, 65), (1,)]
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


class TestNorm:
    def test_it_equals_megatrons(self):
        cpu.apply()  # Megatron's copies its own to the device
        given = tensors()
        ours, _ = tensor_lists.norm(1, NO_OP, [given], False)
        theirs, _ = local_multi_tensor_l2_norm(1, NO_OP, [given], False)
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype) == ((1,), torch.float32)
        assert torch.equal(ours, theirs)

    def test_in_bf16_it_is_close_to_that_of_one_vector(self):
        """Megatron's version sums the norms of bf16 tensors in bf16."""
        given = tensors(torch.bfloat16)
        ours, _ = tensor_lists.norm(1, NO_OP, [given], False)
        whole = torch.cat([tensor.double().flatten() for tensor in given]).norm()
        torch.testing.assert_close(ours, whole.float().view(1), rtol=4e-3, atol=0)

    @pytest.mark.parametrize("bad", [float("inf"), float("nan")])
    def test_what_is_not_finite_stays_so(self, bad: float):
        given = tensors()
        given[1][0] = bad
        ours, _ = tensor_lists.norm(1, NO_OP, [given], False)
        assert not ours.isfinite()


class TestScale:
    @pytest.mark.parametrize("factor", [0.37, 1.0, torch.tensor(0.37)])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_it_equals_megatrons(self, factor: float | torch.Tensor, dtype: torch.dtype):
        sources = tensors()
        ours, theirs = ([torch.empty_like(s, dtype=dtype) for s in sources] for _ in range(2))
        tensor_lists.scale(1, NO_OP, [sources, ours], factor)
        local_multi_tensor_scale(1, NO_OP, [sources, theirs], factor)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))

    def test_sources_may_be_the_targets(self):
        ours = tensors()
        expected = [tensor * 0.25 for tensor in ours]
        pointers = [tensor.data_ptr() for tensor in ours]
        tensor_lists.scale(1, NO_OP, [ours, ours], 0.25)
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
        assert [tensor.data_ptr() for tensor in ours] == pointers


class TestCopy:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_it_rounds_as_copying_each(self, dtype: torch.dtype):
        sources = tensors()
        targets = [torch.empty_like(s, dtype=dtype) for s in sources]
        tensor_lists.copy(sources, targets)
        assert all(torch.equal(t, s.to(dtype)) for s, t in zip(sources, targets, strict=True))

    def test_of_no_tensors(self):
        tensor_lists.copy([], [])


def test_megatron_calls_them():
    cpu.apply()
    tensor_lists.apply()
    if clip_grads.multi_tensor_applier is not local_multi_tensor_applier:
        pytest.skip("Apex or Transformer Engine is installed, and used")
    assert clip_grads.l2_norm_impl is common_utils.multi_tensor_l2norm is tensor_lists.norm
    for module in (clip_grads, optimizer):
        assert module.multi_tensor_scale_impl is tensor_lists.scale
    assert optimizer._multi_tensor_copy_this_to_that is tensor_lists.copy
    parameter = torch.nn.Parameter(torch.ones(8))
    parameter.main_grad = parameter.grad = torch.full((8,), 3.0)
    pointer = parameter.grad.data_ptr()
    clip_grads.clip_grad_by_total_norm_fp32([parameter], max_norm=1.0, total_norm=2.0)
    assert parameter.grad.data_ptr() == pointer
    torch.testing.assert_close(parameter.grad, torch.full((8,), 1.5), rtol=1e-5, atol=0)
