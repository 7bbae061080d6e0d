"""Scales and copies lists of tensors in place, where Apex and Transformer Engine are not installed.

Megatron clips gradients, and copies its fp32 parameters to those of the model, by their
`multi_tensor_scale`. Its own replacement is `dst.copy_(src * scale)`: a temporary of each tensor,
and five passes over memory instead of two.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.optimizer import clip_grads, optimizer
from megatron.core.utils import local_multi_tensor_scale
from torch import Tensor


def apply() -> None:
    """Put `scale` in place of Megatron's, in both modules that hold it. Once per process."""
    for module in (clip_grads, optimizer):
        if module.multi_tensor_scale_impl is local_multi_tensor_scale:
            module.multi_tensor_scale_impl = scale


@torch.no_grad()
def scale(
    chunk_size: int, no_op: Tensor, lists: Sequence[Sequence[Tensor]], factor: float | Tensor
) -> None:
    """lists: [sources, targets], which may be the same tensors; target = source * factor."""
    for source, target in zip(*lists, strict=True):
        if factor == 1:
            target.copy_(source)
        else:
            torch.mul(source, factor, out=target)
