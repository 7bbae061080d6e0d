"""The sum over pairs of tokens of the quadratic CausalRN (Cui et al., arXiv 2406.16168).

    y[t, f] = (1 / t) sum over s <= t of exp( (a[t, f] + b[s, f]) r[t, s] )          t = 1, 2, ...

a and b are centred over the features and r is one over the deviation of a[t] + b[s], so that the
exponent is a normalised vector, of which no element is over sqrt(F - 1): exp() in fp32 is safe up
to F = WIDEST.

Letters: T tokens, B batch, F features, R rows of a block.

A pair has F exponentials, so that all of them would be a [T, T, F] tensor a sample. Rows are worked
through in blocks, forward and again backward, and nothing that large exists:

    p[t, s, f] = g[t, f] / t * exp(...)     da[t] = sum over s of p r,   db[s] = sum over t of p r,
                                            dr[t, s] = sum over f of p (a[t] + b[s])
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

WIDEST = 6400
"""F up to which a sum of a thousand exp(sqrt(F - 1)) fits into fp32."""
BLOCK_ELEMENTS = {"cpu": 2**21, "cuda": 2**25}
"""Exponentials of one sample that exist at a time: 8 MiB, or 128 where blocks cost launches."""


def _blocks(length: int, width: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Rows of a block, and the columns that they see."""
    rows = max(1, BLOCK_ELEMENTS.get(device.type, 2**21) // (length * width))
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        yield slice(start, stop), slice(0, stop)


def _pairs(a: Tensor, b: Tensor, r: Tensor, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
    """a[t] + b[s] and its exponential, 0 where s > t: <float>[R, columns, F] each."""
    sums = a[rows, None] + b[None, columns]
    grown = (sums * r[rows, columns, None]).exp_()
    later = torch.ones(grown.shape[:2], dtype=torch.bool, device=a.device).triu(1 + rows.start)
    return sums, grown.masked_fill_(later[..., None], 0.0)


class _RelationMix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, r: Tensor) -> Tensor:
        ctx.save_for_backward(a, b, r)
        out = torch.empty_like(a)
        for sample in range(a.shape[1]):
            parts = a[:, sample], b[:, sample], r[sample]
            for rows, columns in _blocks(len(a), a.shape[-1], a.device):
                out[rows, sample] = _pairs(*parts, rows, columns)[1].sum(dim=1)
        return out / _counts(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, b, r = ctx.saved_tensors
        share = gradients[0] / _counts(a)
        of_a, of_b, of_r = torch.empty_like(a), torch.zeros_like(b), torch.zeros_like(r)
        for sample in range(a.shape[1]):
            parts = a[:, sample], b[:, sample], r[sample]
            for rows, columns in _blocks(len(a), a.shape[-1], a.device):
                sums, pushed = _pairs(*parts, rows, columns)
                pushed *= share[rows, sample, None]
                of_r[sample, rows, columns] = (pushed * sums).sum(dim=-1)
                pushed *= r[sample, rows, columns, None]
                of_a[rows, sample] = pushed.sum(dim=1)
                of_b[columns, sample] += pushed.sum(dim=0)
        return of_a, of_b, of_r


def _counts(like: Tensor) -> Tensor:
    counts = torch.arange(1, len(like) + 1, device=like.device, dtype=like.dtype)
    return counts[:, None, None]


def relation_mix(a: Tensor, b: Tensor, r: Tensor) -> Tensor:
    """Map a, b: <fp32 or fp64>[T, B, F], and r, [B, T, T] in the same precision, to [T, B, F].

    What lies above the diagonal of r is not read into a result; its gradient is zero.
    """
    return _RelationMix.apply(a, b, r)


def relation_mix_reference(a: Tensor, b: Tensor, r: Tensor) -> Tensor:
    """Compute `relation_mix` slowly, with the tensor of all pairs."""
    sums = a[:, None] + b[None]  # [T, T, B, F]
    grown = (sums * r.movedim(0, -1)[..., None]).exp()
    seen = torch.ones_like(r[0]).tril()
    return (grown * seen[..., None, None]).sum(dim=1) / _counts(a)
