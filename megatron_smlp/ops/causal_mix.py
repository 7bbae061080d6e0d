"""The causal token mixing product: a lower triangle times a stack of sequences.

    y[e, t, n] = sum over s <= t of  M[e, t, s] * v[e, s, n]

Letters: E heads or spatial experts, T tokens, N columns (batch x features of one head).

Half of a dense [T, T] product multiplies by zero. Here the triangle is split recursively, into two
half-size triangles and the square below them,

    y_top = tri(M_11) v_1                      dv_top = tri(M_11)' g_1 + M_21' g_2
    y_low = tri(M_22) v_2 + M_21 v_1           dv_low = tri(M_22)' g_2        dM_21 = g_2 v_1'

down to leaves small enough to be masked and multiplied densely. Squares suit GEMM libraries best:
the same work in row panels was measured 10 % slower on CPU. No mask is saved for the backward, only
the caller's own weight and values, without copies.

The cuts lie at `leaf * 2**k`, whatever T is, so a prefix of a sequence is cut like the whole.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_smlp.ops.blocks import (
    accumulate,
    as_under_autocast,
    block_length,
    by_head,
    gemm_ready,
    multiply,
    save_inputs,
)

IN_TILES = 512
"""Leaf length for bf16 on a CPU with AMX: a masked dense product up to T = 512."""


def _leaf_length(values: Tensor) -> int:
    return block_length(values, in_tiles=IN_TILES)


class _Square(NamedTuple):
    """One product below the leaves: every row of it lies below every column."""

    rows: slice
    columns: slice


@lru_cache(maxsize=256)
def _squares(length: int, leaf: int) -> tuple[_Square, ...]:
    """Return the squares that, with the leaves on the diagonal, make up a triangle.

    Depth first: a square finds its operands still in the cache.
    """

    def cut(start: int, stop: int) -> Iterator[_Square]:
        if stop - start <= leaf:
            return
        half = leaf
        while 2 * half < stop - start:
            half *= 2
        middle = start + half
        yield from cut(start, middle)
        yield from cut(middle, stop)
        yield _Square(slice(middle, stop), slice(start, middle))

    return tuple(cut(0, length))


def _leaves(length: int, leaf: int) -> Iterator[tuple[int, slice]]:
    """Yield the leaves that share a batched product: count and rows; the last may be shorter."""
    whole = length - length % leaf
    if whole:
        yield whole // leaf, slice(0, whole)
    if whole < length:
        yield 1, slice(whole, length)


def _leaf_steps(values: Tensor) -> Iterator[tuple[slice, int, slice]]:
    """Return heads, leaves per head and their rows for each product on the diagonal.

    All heads share a product if their leaves lie evenly in memory.
    """
    num_heads, length, _ = values.shape
    groups = list(_leaves(length, _leaf_length(values)))
    if len(groups) == 1:
        return iter([(slice(0, num_heads), *groups[0])])
    return ((slice(head, head + 1), *group) for head in range(num_heads) for group in groups)


def _diagonal(matrix: Tensor, count: int) -> Tensor:
    """[E, count L, count L] -> the blocks on the diagonal, [E, count, L, L], as a view."""
    blocks = matrix.unflatten(1, (count, -1)).unflatten(3, (count, -1))
    return blocks.diagonal(dim1=1, dim2=3).movedim(-1, 1)


def _cut(values: Tensor, count: int) -> Tensor:
    """[E, count L, N] -> [E count, L, N]: a view, for slices of new memory as in `_leaf_steps`."""
    return values.unflatten(1, (count, -1)).flatten(0, 1)


def _multiply_leaves(weight: Tensor, values: Tensor, *, out: Tensor, transposed: bool) -> None:
    """Set all rows of `out` to the leaves' products, M v or M' v, in as few calls as possible:
    otherwise, small products on several threads synchronize after each one."""
    for heads, count, rows in _leaf_steps(values):
        diagonal = _diagonal(weight[heads, rows, rows], count)
        # Packed first: torch's `tril` is thirty times slower on a view like this.
        leaves = values.new_empty(diagonal.shape).copy_(diagonal).tril_().flatten(0, 1)
        torch.bmm(
            leaves.mT if transposed else leaves,
            _cut(values[heads, rows], count),
            out=_cut(out[heads, rows], count),
        )


@torch.library.custom_op("megatron_smlp::causal_mix", mutates_args=())
def _mix(weight: Tensor, values: Tensor) -> Tensor:
    values = gemm_ready(values)
    out = values.new_empty(values.shape)
    _multiply_leaves(weight, values, out=out, transposed=False)
    squares = _squares(values.shape[1], _leaf_length(values))
    for matrix, read, written in by_head(weight, values, out):
        for rows, columns in squares:
            block = matrix[..., rows, columns].to(values.dtype)
            accumulate(block, read[..., columns, :], out=written[..., rows, :])
    return out


def _set_leaf_gradients(gradient: Tensor, values: Tensor, *, out: Tensor) -> None:
    """Set the diagonal blocks of tril(g v')."""
    for heads, count, rows in _leaf_steps(values):
        left, right = (_cut(each[heads, rows], count) for each in (gradient, values))
        # A stack of one with a transposed operand takes a slow path through oneDNN.
        product = (left[0] @ right[0].mT)[None] if len(left) == 1 else left @ right.mT
        target = _diagonal(out[heads, rows, rows], count)
        target.copy_(product.tril_().unflatten(0, target.shape[:2]))


@torch.library.custom_op("megatron_smlp::causal_mix_gradients", mutates_args=())
def _gradients(weight: Tensor, gradient: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Compute both in one pass: a block of the gradient is read for both while in the cache."""
    gradient, values = gemm_ready(gradient), gemm_ready(values)
    num_heads, length, _ = values.shape
    of_values = gradient.new_empty(gradient.shape)
    of_weight = values.new_empty(num_heads, length, length)
    _multiply_leaves(weight, gradient, out=of_values, transposed=True)
    _set_leaf_gradients(gradient, values, out=of_weight)
    squares = _squares(length, _leaf_length(values))
    stacks = by_head(weight, gradient, values, of_weight, of_values)
    for matrix, given, read, for_matrix, for_values in stacks:
        for rows, columns in squares:
            block, lower = matrix[..., rows, columns].to(given.dtype), given[..., rows, :]
            accumulate(block.mT, lower, out=for_values[..., columns, :])
            multiply(lower, read[..., columns, :].mT, out=for_matrix[..., rows, columns])
            for_matrix[..., columns, rows].zero_()
    return of_weight.to(weight.dtype), of_values


@_mix.register_fake
def _(weight: Tensor, values: Tensor) -> Tensor:
    return values.new_empty(values.shape)


@_gradients.register_fake
def _(weight: Tensor, gradient: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    return weight.new_empty(weight.shape), gradient.new_empty(gradient.shape)


def _backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor]:
    weight, values = ctx.saved_tensors
    return _gradients(weight, gradient, values)


_mix.register_autograd(_backward, setup_context=save_inputs)


def _check_shapes(weight: Tensor, values: Tensor) -> None:
    if (
        weight.dim() != 3
        or values.dim() != 3
        or weight.shape != (*values.shape[:2], values.shape[1])
    ):
        raise ValueError(
            f"causal_mix: weight has shape {tuple(weight.shape)} and values {tuple(values.shape)}, "
            "expected weight [E, T, T] and values [E, T, N]; for a sequence of t < T tokens "
            "pass weight[:, :t, :t]"
        )


def causal_mix(weight: Tensor, values: Tensor) -> Tensor:
    """Multiply the lower triangle of each matrix, diagonal included, with its sequence.

    weight: <float>[E, T, T]. Entries above the diagonal never affect a result: they may be NaN,
        and their gradient is zero. The weight may have a higher precision than the values; it is
        then rounded block by block, and its gradient has the weight's precision.
    values: <float>[E, T, N], any strides. Under autocast they are cast like a matmul's operands.
    Returns <float>[E, T, N] in the precision of the values.

    Row t is bitwise independent of finite values at later positions. A prefix,
    `causal_mix(weight[:, :t, :t], values[:, :t])`, gives the first t rows up to the rounding of the
    GEMM library, which may choose another kernel for fewer rows.
    Differentiable once, also under activation recompute and `torch.compile`.
    Raises ValueError where the shapes do not fit.
    """
    _check_shapes(weight, values)
    return _mix(weight, as_under_autocast(values))


def causal_mix_reference(weight: Tensor, values: Tensor) -> Tensor:
    """Compute `causal_mix` slowly: mask, then multiply densely. Same shapes and result."""
    _check_shapes(weight, values)
    return torch.matmul(weight.tril(), values)
