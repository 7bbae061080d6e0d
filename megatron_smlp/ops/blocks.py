"""What the blocked products of token mixing share: GEMMs on slices, and what autograd saves."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor


@cache
def multiplies_tiles() -> bool:
    """Return whether this CPU multiplies bf16 in tiles (AMX), many times as fast as fp32."""
    return bool(torch.cpu._is_amx_tile_supported())


def block_length(values: Tensor, *, in_tiles: int = 128) -> int:
    """Return the rows below which further cuts cost more than the work they save (measured).

    This does not depend on T, so that a prefix is cut like the whole. A GPU needs all of its
    multiprocessors busy. On a CPU, 128 was the best of 32, 64, 128 and 256 in most shapes, and
    within 15 % of the best in all of them, in fp32 and bf16.

    Args:
        in_tiles: the answer for bf16 on a CPU with AMX, where passes over memory dominate.
    """
    if values.device.type != "cpu":
        return 256
    return in_tiles if values.dtype == torch.bfloat16 and multiplies_tiles() else 128


def by_head(*stacks: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Split stacks of heads into what one call works on: all heads on a GPU, else one head.

    A CPU's cache holds the blocks of one head, and a batched product with a strided output would
    make copies there.
    """
    if stacks[0].device.type != "cpu":
        return [stacks]
    return zip(*(stack.unbind() for stack in stacks), strict=True)


def multiply(left: Tensor, right: Tensor, *, out: Tensor) -> None:
    """out = left @ right, of matrices or of stacks of them, into a strided `out`."""
    product = torch.mm if out.dim() == 2 else torch.bmm
    product(left, right, out=out)


def accumulate(left: Tensor, right: Tensor, *, out: Tensor) -> None:
    """out += left @ right, of matrices or of stacks of them, into a strided `out`."""
    if out.dim() == 2:
        out.addmm_(left, right)
    else:
        out.baddbmm_(left, right)


def gemm_ready(matrix: Tensor) -> Tensor:
    """Return the tensor if BLAS can read its strides, else one copy instead of one per block."""
    return matrix if 1 in matrix.stride()[-2:] else matrix.contiguous()


def as_under_autocast(values: Tensor) -> Tensor:
    """Cast as autocast, if it is on, casts the operands of a matmul."""
    kind = values.device.type
    if torch.is_autocast_enabled(kind) and values.dtype != torch.float64:
        return values.to(torch.get_autocast_dtype(kind))
    return values


def save_inputs(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor
) -> None:
    """Save all that a product's backward needs: the caller's own tensors, no copies."""
    ctx.save_for_backward(*inputs)
