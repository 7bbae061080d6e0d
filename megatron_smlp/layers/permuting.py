"""Permutation of rows whose backward moves the gradients back instead of summing them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function


def permuted(x: Tensor, order: Tensor, inverse: Tensor, *, dim: int) -> Tensor:
    """Return y[.., i, ..] = x[.., order[i], ..].

    x: <float>[.., R, ..], R at `dim`; order: <int64>[R], a permutation, and its inverse.
    """
    return _Permuted.apply(x, order, inverse, dim)


class _Permuted(Function):
    """See `permuted`; the backward of plain indexing would sum, by atomics or by a sort."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.dim = dim
        return x.index_select(dim, order)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradients[0].index_select(ctx.dim, inverse), None, None, None
