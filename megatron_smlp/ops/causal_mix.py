"""The causal token mixing product: a lower triangle times a stack of sequences.

    y[e, t, n] = sum over s <= t of  M[e, t, s] * v[e, s, n]

Letters: E heads or spatial experts, T tokens, N columns (batch x features of one head).

Half of a dense [T, T] product is multiplications by zero. Here the triangle is cut once more in two
at every level: two half-size triangles and the square below them,

    y_top = tri(M_11) v_1                      dv_top = tri(M_11)' g_1 + M_21' g_2
    y_low = tri(M_22) v_2 + M_21 v_1           dv_low = tri(M_22)' g_2        dM_21 = g_2 v_1'

down to leaves small enough to be masked and multiplied densely. Squares are the shape that GEMM
libraries like best: the same work in row panels was measured 10 % slower on CPU. No mask is kept, and
the backward saves the caller's own weight and values, no copy of them.

The cuts lie at `leaf * 2**k`, whatever T is, so a prefix of a sequence is cut like the whole.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class _Square(NamedTuple):
    """One dense block under the diagonal."""

    rows: slice
    columns: slice


class _Plan(NamedTuple):
    """Every block of a triangle of one size, smallest first."""

    leaves: tuple[slice, ...]
    squares: tuple[_Square, ...]


@lru_cache(maxsize=256)
def _plan(length: int, leaf: int) -> _Plan:
    leaves: list[slice] = []
    squares: list[_Square] = []

    def cut(start: int, stop: int) -> None:
        if stop - start <= leaf:
            leaves.append(slice(start, stop))
            return
        half = leaf
        while 2 * half < stop - start:
            half *= 2
        middle = start + half
        cut(start, middle)
        cut(middle, stop)
        squares.append(_Square(slice(middle, stop), slice(start, middle)))

    if length > 0:
        cut(0, length)
    return _Plan(tuple(leaves), tuple(squares))


def _leaf_size(values: Tensor) -> int:
    """Rows below which cutting on costs more than the multiplications that it saves.

    It depends on the device, the precision and N, not on T (see the module's last line). A reduced
    precision GEMM is so fast that the call around it counts; so is a GPU, which also wants all of its
    multiprocessors busy.
    """
    if values.device.type != "cpu":
        return 256
    if values.dtype in (torch.bfloat16, torch.float16):
        return 256
    return 128 if values.shape[-1] >= 512 else 64


def _multiply(left: Tensor, right: Tensor, *, out: Tensor) -> None:
    """out = left @ right over the leading dimension, into a strided `out`."""
    if out.device.type != "cpu":
        torch.bmm(left, right, out=out)
        return
    # CPU: a batched product with a strided output is copied around, single ones are not.
    for index in range(out.shape[0]):
        torch.mm(left[index], right[index], out=out[index])


def _accumulate(left: Tensor, right: Tensor, *, out: Tensor) -> None:
    """out += left @ right over the leading dimension, into a strided `out`."""
    if out.device.type != "cpu":
        out.baddbmm_(left, right)
        return
    for index in range(out.shape[0]):
        out[index].addmm_(left[index], right[index])


def _gemm_ready(matrix: Tensor) -> Tensor:
    """The tensor itself where BLAS can read its strides, else one copy instead of one per block."""
    return matrix if 1 in matrix.stride()[-2:] else matrix.contiguous()


@torch.library.custom_op("megatron_smlp::causal_mix", mutates_args=())
def _mix(weight: Tensor, values: Tensor) -> Tensor:
    values = _gemm_ready(values)
    plan = _plan(values.shape[1], _leaf_size(values))
    out = torch.empty(values.shape, dtype=values.dtype, device=values.device)
    for block in plan.leaves:
        triangle = weight[:, block, block].to(values.dtype).tril()
        _multiply(triangle, values[:, block], out=out[:, block])
    for rows, columns in plan.squares:
        square = weight[:, rows, columns].to(values.dtype)
        _accumulate(square, values[:, columns], out=out[:, rows])
    return out


@torch.library.custom_op("megatron_smlp::causal_mix_values_gradient", mutates_args=())
def _values_gradient(weight: Tensor, gradient: Tensor) -> Tensor:
    gradient = _gemm_ready(gradient)
    plan = _plan(gradient.shape[1], _leaf_size(gradient))
    out = torch.empty(gradient.shape, dtype=gradient.dtype, device=gradient.device)
    for block in plan.leaves:
        triangle = weight[:, block, block].to(gradient.dtype).tril()
        _multiply(triangle.mT, gradient[:, block], out=out[:, block])
    for rows, columns in plan.squares:
        square = weight[:, rows, columns].to(gradient.dtype)
        _accumulate(square.mT, gradient[:, rows], out=out[:, columns])
    return out


@torch.library.custom_op("megatron_smlp::causal_mix_weight_gradient", mutates_args=())
def _weight_gradient(gradient: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
    gradient, values = _gemm_ready(gradient), _gemm_ready(values)
    heads, length, _ = values.shape
    plan = _plan(length, _leaf_size(values))
    out = torch.empty(heads, length, length, dtype=values.dtype, device=values.device)
    for block in plan.leaves:
        _multiply(gradient[:, block], values[:, block].mT, out=out[:, block, block])
        out[:, block, block].tril_()
    for rows, columns in plan.squares:
        _multiply(gradient[:, rows], values[:, columns].mT, out=out[:, rows, columns])
        out[:, columns, rows].zero_()
    return out.to(dtype)


@_mix.register_fake
def _(weight: Tensor, values: Tensor) -> Tensor:
    return values.new_empty(values.shape)


@_values_gradient.register_fake
def _(weight: Tensor, gradient: Tensor) -> Tensor:
    return gradient.new_empty(gradient.shape)


@_weight_gradient.register_fake
def _(gradient: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
    heads, length, _ = values.shape
    return values.new_empty((heads, length, length), dtype=dtype)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(
    ctx: torch.autograd.function.FunctionCtx, gradient: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    weight, values = ctx.saved_tensors
    needs_weight, needs_values = ctx.needs_input_grad
    return (
        _weight_gradient(gradient, values, weight.dtype) if needs_weight else None,
        _values_gradient(weight, gradient) if needs_values else None,
    )


_mix.register_autograd(_backward, setup_context=_save)


def _check_shapes(weight: Tensor, values: Tensor) -> None:
    if weight.dim() != 3 or values.dim() != 3 or weight.shape != (*values.shape[:2], values.shape[1]):
        raise ValueError(
            f"causal_mix: weight has shape {tuple(weight.shape)} and values {tuple(values.shape)}, "
            "but weight [E, T, T] and values [E, T, N] are needed; for a sequence of t < T tokens pass "
            "weight[:, :t, :t]"
        )


def causal_mix(weight: Tensor, values: Tensor) -> Tensor:
    """Multiply the lower triangle of each matrix, diagonal included, with its sequence.

    weight: <float>[E, T, T]. What lies above the diagonal is never read into a result: it may be
        NaN, and its gradient is zero. It may be kept in a higher precision than the values; it is
        then rounded block by block, and its gradient has its own precision.
    values: <float>[E, T, N], any strides. Under autocast they are cast as a matmul's operands are.
    Returns <float>[E, T, N] in the precision of the values.

    Row t is bitwise independent of finite values at later positions. A prefix,
    `causal_mix(weight[:, :t, :t], values[:, :t])`, gives the first t rows up to the rounding of the
    GEMM library, which may choose another kernel for the rows that remain.
    Differentiable once, under activation recompute and `torch.compile` too.
    Raises ValueError where the shapes do not fit.
    """
    _check_shapes(weight, values)
    kind = values.device.type
    if torch.is_autocast_enabled(kind) and values.dtype != torch.float64:
        values = values.to(torch.get_autocast_dtype(kind))
    return _mix(weight, values)


def causal_mix_reference(weight: Tensor, values: Tensor) -> Tensor:
    """The slow twin of `causal_mix`: mask, then multiply densely. Same shapes and result."""
    _check_shapes(weight, values)
    return torch.matmul(weight.tril(), values)
