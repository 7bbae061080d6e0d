"""The causal token mixing product where M[t, s] depends only on the distance t - s.

    y[e, t, n] = sum over k = 0 .. min(t, K - 1) of  m[e, k] * v[e, t - k, n]

Letters: E heads or spatial experts, K distances with a weight, T tokens, N columns, L block length,
W = span of a panel: the smallest multiple of L that holds every column which L rows can reach.

All blocks of L rows of such a matrix are one matrix, shifted right: one panel [L, W] per head is
built from m, and every block of rows is one product with it,

    R[a, x] = m[W - L + a - x]        y_i  = R[:, last columns] v[.. (i + 1) L]
    C[b, x] = m[x - b]                dv_j = C[:, first columns] g[j L ..]
                                      dR  += g_i v[.. (i + 1) L]'   dm = dR summed along diagonals

so that nothing of size T x T exists. An FFT needs fewer multiplications, but leaks the rounding of
later tokens into earlier ones: docs/decisions/0052 has the measurements.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
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


class _Step(NamedTuple):
    """One block of rows and what it reads: rows and columns of M, columns of the panel."""

    rows: slice
    columns: slice
    panel: slice

    @property
    def height(self) -> int:
        return int(self.rows.stop - self.rows.start)


def _span(num_weights: int, length: int, block: int) -> int:
    """Return W; at most T rounded up, since no row reads before the first token."""
    blocks = min(-(-length // block), -(-(num_weights + block - 1) // block))
    return blocks * block


def _looking_back(length: int, *, span: int, block: int) -> Iterator[_Step]:
    """Yield rows and the earlier columns that they read, with R's columns."""
    for start in range(0, length, block):
        stop = min(start + block, length)
        first = max(0, start + block - span)
        left = span - block - (start - first)
        yield _Step(slice(start, stop), slice(first, stop), slice(left, left + stop - first))


def _looking_ahead(length: int, *, span: int, block: int) -> Iterator[_Step]:
    """Yield columns of M as rows of M', and the later tokens that they read, with C's columns."""
    for start in range(0, length, block):
        stop, last = min(start + block, length), min(start + span, length)
        yield _Step(slice(start, stop), slice(start, last), slice(0, last - start))


def _padded(weight: Tensor, *, span: int, block: int) -> Tensor:
    """Return m for the distances 1 - L .. W - 1, zero where it has none: [E, W + L - 1]."""
    return F.pad(weight[:, :span], (block - 1, max(0, span - weight.shape[1])))


def _panel(line: Tensor, span: int) -> Tensor:
    """[E, W + L - 1] -> [E, L, W], whose row i starts at place L - 1 - i."""
    return line.unfold(1, span, 1).flip(1)


def _sum_of_diagonals(panel: Tensor) -> Tensor:
    """Apply the adjoint of `_panel`: [E, L, W] -> [E, W + L - 1]."""
    heads, block, span = panel.shape
    width = span + block - 1
    # Read with rows one element shorter than written, each row shifts one place to the right.
    rows = F.pad(panel.flip(1), (0, block)).flatten(1)[:, : block * width]
    return rows.view(heads, block, width).sum(dim=1)


def _multiply_blocks(line: Tensor, values: Tensor, steps: Iterator[_Step], *, span: int) -> Tensor:
    """Compute every block of rows as one product with the panel of `line`, in new memory."""
    out = values.new_empty(values.shape)
    panel = _panel(line, span) if values.shape[1] else line
    blocks = list(steps)
    for matrix, read, written in by_head(panel, values, out):
        for step in blocks:
            rows = matrix[..., : step.height, step.panel]
            multiply(rows, read[..., step.columns, :], out=written[..., step.rows, :])
    return out


@torch.library.custom_op("megatron_smlp::toeplitz_mix", mutates_args=())
def _mix(weight: Tensor, values: Tensor) -> Tensor:
    values = gemm_ready(values)
    length, block = values.shape[1], block_length(values, in_tiles=256)
    span = _span(weight.shape[1], length, block)
    line = _padded(weight.to(values.dtype), span=span, block=block).flip(1)
    return _multiply_blocks(line, values, _looking_back(length, span=span, block=block), span=span)


@torch.library.custom_op("megatron_smlp::toeplitz_mix_gradients", mutates_args=())
def _gradients(weight: Tensor, gradient: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    gradient, values = gemm_ready(gradient), gemm_ready(values)
    heads, length, _ = values.shape
    block = block_length(values, in_tiles=256)
    span = _span(weight.shape[1], length, block)
    line = _padded(weight.to(gradient.dtype), span=span, block=block)
    ahead = _looking_ahead(length, span=span, block=block)
    of_values = _multiply_blocks(line, gradient, ahead, span=span)
    panel = values.new_zeros(heads, block, span)
    blocks = list(_looking_back(length, span=span, block=block))
    for left, right, written in by_head(gradient, values, panel):
        for step in blocks:
            rows = written[..., : step.height, step.panel]
            accumulate(left[..., step.rows, :], right[..., step.columns, :].mT, out=rows)
    of_weight = torch.zeros_like(weight)
    if length:
        exact = panel if panel.dtype == torch.float64 else panel.float()
        sums = _sum_of_diagonals(exact).flip(1)[:, block - 1 :]
        used = min(weight.shape[1], length)
        of_weight[:, :used] = sums[:, :used]
    return of_weight, of_values


@_mix.register_fake
def _(weight: Tensor, values: Tensor) -> Tensor:
    return values.new_empty(values.shape)


@_gradients.register_fake
def _(weight: Tensor, gradient: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight), gradient.new_empty(gradient.shape)


def _backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor]:
    weight, values = ctx.saved_tensors
    return _gradients(weight, gradient, values)


_mix.register_autograd(_backward, setup_context=save_inputs)


def _check_shapes(weight: Tensor, values: Tensor) -> None:
    if weight.dim() != 2 or values.dim() != 3 or len(weight) != len(values) or not weight.shape[1]:
        raise ValueError(
            f"toeplitz_mix: weight has shape {tuple(weight.shape)} and values "
            f"{tuple(values.shape)}, expected weight [E, K] with K >= 1 and values [E, T, N]"
        )


def toeplitz_mix(weight: Tensor, values: Tensor) -> Tensor:
    """Multiply the lower triangular Toeplitz matrix of each vector with its sequence.

    weight: <float>[E, K], by distance: a token reads itself and the K - 1 before it. T may be
        smaller or larger than K. The weight may have a higher precision than the values; it is
        then rounded once, and its gradient has the weight's precision.
    values: <float>[E, T, N], any strides. Under autocast they are cast like a matmul's operands.
    Returns <float>[E, T, N] in the precision of the values.

    Row t is bitwise independent of finite values at later positions. Differentiable once, also
    under activation recompute and `torch.compile`.
    Raises ValueError where the shapes do not fit.
    """
    _check_shapes(weight, values)
    return _mix(weight, as_under_autocast(values))


def toeplitz_mix_reference(weight: Tensor, values: Tensor) -> Tensor:
    """Compute `toeplitz_mix` slowly, by its definition, one distance after the other."""
    _check_shapes(weight, values)
    length = values.shape[1]
    out = torch.zeros_like(values)
    for distance in range(min(length, weight.shape[1])):
        moved = F.pad(values[:, : length - distance], (0, 0, distance, 0))
        out = out + weight[:, distance, None, None] * moved
    return out
