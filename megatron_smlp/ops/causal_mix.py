"""The causal token mixing product: a lower triangle times a stack of sequences.

    y[e, t, n] = sum over s <= t of  M[e, t, s] * v[e, s, n]

Letters: E heads or spatial experts, T tokens, N columns (batch x features of one head).

Half of a dense [T, T] product is multiplications by zero. Here the triangle is cut once more in two
at every level: two half-size triangles and the square below them,

    y_top = tri(M_11) v_1                      dv_top = tri(M_11)' g_1 + M_21' g_2
    y_low = tri(M_22) v_2 + M_21 v_1           dv_low = tri(M_22)' g_2        dM_21 = g_2 v_1'

down to leaves small enough to be masked and multiplied densely. Squares are the shape that GEMM
libraries like best: the same work in row panels was measured 10 % slower on CPU. No mask is kept,
and the backward saves the caller's own weight and values, no copy of them.

The cuts lie at `leaf * 2**k`, whatever T is, so a prefix of a sequence is cut like the whole.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class _Block(NamedTuple):
    """One product: a leaf on the diagonal (rows == columns), or a square below it."""

    rows: slice
    columns: slice

    @property
    def is_leaf(self) -> bool:
        return self.rows == self.columns


@lru_cache(maxsize=256)
def _blocks(length: int, leaf: int) -> tuple[_Block, ...]:
    """All blocks of one triangle, depth first: a square finds its operands still in the cache."""

    def cut(start: int, stop: int) -> Iterator[_Block]:
        if stop - start <= leaf:
            yield _Block(slice(start, stop), slice(start, stop))
            return
        half = leaf
        while 2 * half < stop - start:
            half *= 2
        middle = start + half
        yield from cut(start, middle)
        yield from cut(middle, stop)
        yield _Block(slice(middle, stop), slice(start, middle))

    return tuple(cut(0, length)) if length > 0 else ()


def _leaf_size(values: Tensor) -> int:
    """Rows below which cutting on costs more than the multiplications that it saves (measured).

    It does not depend on T (see the module's last line). A reduced precision GEMM is so fast that
    the calls around it count; so is a GPU, which also wants all of its multiprocessors busy.
    """
    is_cpu = values.device.type == "cpu"
    return 128 if is_cpu and values.dtype in (torch.float32, torch.float64) else 256


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
    out = torch.empty(values.shape, dtype=values.dtype, device=values.device)
    for block in _blocks(values.shape[1], _leaf_size(values)):
        matrix = weight[:, block.rows, block.columns].to(values.dtype)
        if block.is_leaf:
            _multiply(matrix.tril(), values[:, block.columns], out=out[:, block.rows])
        else:
            _accumulate(matrix, values[:, block.columns], out=out[:, block.rows])
    return out


@torch.library.custom_op("megatron_smlp::causal_mix_values_gradient", mutates_args=())
def _values_gradient(weight: Tensor, gradient: Tensor) -> Tensor:
    gradient = _gemm_ready(gradient)
    out = torch.empty(gradient.shape, dtype=gradient.dtype, device=gradient.device)
    for block in _blocks(gradient.shape[1], _leaf_size(gradient)):
        matrix = weight[:, block.rows, block.columns].to(gradient.dtype)
        if block.is_leaf:
            _multiply(matrix.tril().mT, gradient[:, block.rows], out=out[:, block.columns])
        else:
            _accumulate(matrix.mT, gradient[:, block.rows], out=out[:, block.columns])
    return out


@torch.library.custom_op("megatron_smlp::causal_mix_weight_gradient", mutates_args=())
def _weight_gradient(gradient: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
    gradient, values = _gemm_ready(gradient), _gemm_ready(values)
    heads, length, _ = values.shape
    out = torch.empty(heads, length, length, dtype=values.dtype, device=values.device)
    for rows, columns in _blocks(length, _leaf_size(values)):
        product = out[:, rows, columns]
        _multiply(gradient[:, rows], values[:, columns].mT, out=product)
        if rows == columns:
            product.tril_()
        else:
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


def _save(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor
) -> None:
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
    if (
        weight.dim() != 3
        or values.dim() != 3
        or weight.shape != (*values.shape[:2], values.shape[1])
    ):
        raise ValueError(
            f"causal_mix: weight has shape {tuple(weight.shape)} and values {tuple(values.shape)}, "
            "but weight [E, T, T] and values [E, T, N] are needed; for a sequence of t < T tokens "
            "pass weight[:, :t, :t]"
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
