"""Causal scaled dot-product attention, by the fastest method for the tensors' device.

    y = softmax(q k' * scale + causal mask) v                   (Vaswani et al., arXiv 1706.03762)

That is torch's SDPA on a GPU, in evaluation and for long sequences. Its flash kernel for CPUs works
in tiles of 32 rows, and its backward pass is several times slower than the few batched products
that short sequences need. So a CPU trains them in blocks of rows, each with the columns to its end:

    P = softmax(S)      S = q k' * scale + mask              dv = P' g
    dS = P (g v' - sum over d of g y)                        dq = dS k * scale,  dk = dS' q * scale

P is saved for the backward pass, T^2 / 2 numbers per head, so long sequences go to SDPA.

Letters: B batch, n heads, g key/value groups, T tokens, d head width, N = B n.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megatron_smlp.ops.blocks import block_length

LONGEST = 512
"""Tokens up to which blocks are used: their memory grows with T^2, their speedup does not."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    training: bool = False,
    allowed: Tensor | None = None,
) -> Tensor:
    """Mix values by the similarity of queries and keys.

    Args:
        query: <float>[B, n, T, d].
        key, value: <float>[B, g, T, d], g a divisor of n.
        scale: of the scores; None: 1 / sqrt(d).
        dropout: probability with which a weight is dropped in training.
        training: whether gradients will be needed. This, not autograd's state, chooses the
            method: a recomputed forward pass must round as the first one did.
        allowed: <bool>[B, 1, T, T], replaces the causal mask: what position t may read.

    Returns:
        <float>[B, n, T, d].
    """
    dropout = dropout if training else 0.0
    in_blocks = query.device.type == "cpu" and query.shape[2] <= LONGEST
    with torch.autocast(query.device.type, enabled=False):
        if training and in_blocks and dropout == 0.0 and allowed is None:
            return attention_in_blocks(query, key, value, scale=scale)
        return functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=allowed,
            dropout_p=dropout,
            is_causal=allowed is None,
            scale=scale,
            enable_gqa=key.shape[1] != query.shape[1],
        )


def attention_in_blocks(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float | None
) -> Tensor:
    """Compute `attend` in blocks of rows. Same shapes and result."""
    shares = query.shape[1] // key.shape[1]
    if shares > 1:
        key, value = (x.repeat_interleave(shares, dim=1) for x in (key, value))
    heads = [x.flatten(0, 1) for x in (query, key, value)]
    mixed: Tensor = _Blocks.apply(*heads, query.shape[-1] ** -0.5 if scale is None else scale)
    return mixed.unflatten(0, query.shape[:2])


class _Blocks(torch.autograd.Function):
    """q, k, v: <float>[N, T, d] -> <float>[N, T, d]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        weights = [_weights(q[:, rows], k[:, : rows.stop], scale) for rows in _blocks(q)]
        mixed = [torch.bmm(p, v[:, : p.shape[2]]) for p in weights]
        y = mixed[0] if len(mixed) == 1 else torch.cat(mixed, dim=1)
        ctx.save_for_backward(q, k, v, y, *weights)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, y, *weights = ctx.saved_tensors
        g = gradients[0].contiguous()
        means = (g.float() * y).sum(dim=-1, keepdim=True).to(g.dtype)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for rows, p in zip(_blocks(q), weights, strict=True):
            upstream, past = g[:, rows], slice(rows.stop)
            of_scores = torch.bmm(upstream, v[:, past].transpose(1, 2))
            of_scores = of_scores.sub_(means[:, rows]).mul_(p)
            dq[:, rows] = torch.bmm(of_scores, k[:, past])
            dk[:, past] += torch.bmm(of_scores.transpose(1, 2), q[:, rows])
            dv[:, past] += torch.bmm(p.transpose(1, 2), upstream)
        return dq.mul_(ctx.scale), dk.mul_(ctx.scale), dv, None


def _blocks(q: Tensor) -> list[slice]:
    tokens, rows = q.shape[1], block_length(q)
    return [slice(row, min(tokens, row + rows)) for row in range(0, tokens, rows)]


def _weights(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Return P of the last rows of a sequence, <float>[N, rows, columns]."""
    rows, columns = q.shape[1], k.shape[1]
    mask = q.new_full((rows, columns), float("-inf")).triu_(columns - rows + 1)
    return torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scale).softmax(dim=-1)
