"""RMSNorm on a CPU, a few rows at a time.

    y = x / sqrt(mean(x^2) + eps) * w                       (Zhang and Sennrich, arXiv 1910.07467)

torch has no dedicated kernel on a CPU: it passes over all of x once for each operation of the
formula and of its derivative, in fp32. Here the same operations see rows that fit a core's cache.
The reference is `torch.nn.functional.rms_norm`.

Letters: n rows, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_smlp.ops.rows import in_rows

ELEMENTS = 2**17
"""Elements of x that are cast to fp32 at a time: 512 KiB."""


class RowwiseRMSNorm(torch.autograd.Function):
    """x: <float>[..., D], w: <float>[D], eps -> <float>[..., D] in x's dtype, via fp32 or wider."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        scales = torch.empty((*x.shape[:-1], 1), dtype=wide, device=x.device)
        for some, scale, into in in_rows(ELEMENTS, *_flat(x, scales, y)):
            rows = some.to(wide, copy=True)
            scale.copy_(rows.square().mean(-1, keepdim=True).add_(eps).rsqrt_())
            into.copy_(rows.mul_(scale).mul_(weight))
        ctx.save_for_backward(x, weight, scales)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scales = ctx.saved_tensors
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        dw = torch.zeros_like(weight, dtype=scales.dtype)
        for some, scale, dy, into in in_rows(ELEMENTS, *_flat(x, scales, gradient, dx)):
            normed = some.to(scales.dtype, copy=True).mul_(scale)
            rows = dy.to(scales.dtype, copy=True)
            dw += (rows * normed).sum(0)
            rows.mul_(weight)
            along = (rows * normed).mean(-1, keepdim=True)
            into.copy_(rows.addcmul_(normed, along, value=-1).mul_(scale))
        return dx, dw.to(weight.dtype), None


def _flat(*tensors: Tensor) -> list[Tensor]:
    return [tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors]
