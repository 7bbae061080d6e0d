"""One operator per list of tensors, where Megatron loops over them.

With Apex or Transformer Engine, a norm, a scaling or a copy is one kernel for all tensors.
Megatron's own fallbacks take each tensor by itself, and on a GPU wait for each norm. These versions
use torch's `_foreach` operators, which on a CPU loop over the same kernels.

| Megatron's | what it is for | for n tensors, on a GPU |
|---|---|---|
| local_multi_tensor_l2_norm | norm of the gradients, of the parameters | n + 1 waits, n norms |
| local_multi_tensor_scale | clipping | n products, n copies, n temporaries |
| _multi_tensor_copy_this_to_that | fp32 weights to those of the model | n copies |
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer
from megatron.core.utils import local_multi_tensor_l2_norm, local_multi_tensor_scale
from megatron.training.utils import common_utils
from torch import Tensor


def apply() -> None:
    """Replace Megatron's functions with those below, in each module that holds them."""
    names = {clip_grads: "l2_norm_impl", common_utils: "multi_tensor_l2norm"}
    for module, name in names.items():
        if getattr(module, name) is local_multi_tensor_l2_norm:
            setattr(module, name, norm)
    for module in (clip_grads, optimizer):
        if module.multi_tensor_scale_impl is local_multi_tensor_scale:
            module.multi_tensor_scale_impl = scale
    if not distrib_optimizer.HAVE_APEX_OR_TE:
        optimizer._multi_tensor_copy_this_to_that = copy


@torch.no_grad()
def norm(
    chunk_size: int, no_op: Tensor, lists: Sequence[Sequence[Tensor]], per_tensor: bool
) -> tuple[Tensor, None]:
    """Return the L2 norm over all elements of lists = [tensors], <fp32>[1], on their device."""
    (tensors,) = lists
    norms = torch.stack(torch._foreach_norm(tensors))
    return torch.linalg.vector_norm(norms, dtype=torch.float32).view(1), None


@torch.no_grad()
def scale(
    chunk_size: int, no_op: Tensor, lists: Sequence[Sequence[Tensor]], factor: float | Tensor
) -> None:
    """Set target = source * factor, for lists = [sources, targets], which may be the same list."""
    sources, targets = lists
    if sources is targets:
        torch._foreach_mul_(targets, factor)
    elif factor == 1:
        copy(sources, targets)
    else:
        copy(torch._foreach_mul(sources, factor), targets)


@torch.no_grad()
def copy(
    this: Sequence[Tensor], that: Sequence[Tensor], overflow_buf: Tensor | None = None
) -> None:
    """Set that = this, tensor by tensor; dtypes may differ."""
    if this:
        torch._foreach_copy_(that, this)
