"""CausalRN, causal relation networks (Cui et al., arXiv 2406.16168).

    a = n(x W1),  b = n(x W2);   n is LN without weights
    linear      y_t = n( exp(a_t) * (1/t) sum over s <= t of exp(b_s) ) W3
    quadratic   y_t = n( (1/t) sum over s <= t of exp(n(a_t + b_s)) ) W3             t = 1, 2, ...

The linear variant is the quadratic one without the inner n, so that the sum factorizes: its cost
grows with T, not with T^2. It is computed as n(exp(z_t - max over features of z_t)), z_t = a_t +
log of the mean: n removes a common factor again.

Differences from the source (docs/decisions/0070): one head; the layer's LN has weights. W3 starts
smaller by sqrt(2 layers), like all projections to the residual here; input positions are learned.

Letters: B batch, T sequence, F --relation-width.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import layer_norm
from torch.utils.checkpoint import checkpoint

from megatron_smlp.plugins import TokenMixer, option, register

EPS = 1e-5
WIDEST = 6400
"""The largest F for which a sum of a thousand exp(sqrt(F - 1)) fits into fp32."""
BLOCK = 2**21
"""Exponentials of one sample held at a time: 8 MiB."""


def normed(x: Tensor) -> Tensor:
    """n: <float>[..., F] -> the same shape, in fp32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return layer_norm(wide, wide.shape[-1:], eps=EPS)


def counts(like: Tensor) -> Tensor:
    """1, 2, ..., T, [T, 1]."""
    count = like.shape[1]
    return torch.arange(1, count + 1, device=like.device, dtype=like.dtype)[:, None]


@register("causal_rn")
class CausalRN(TokenMixer):
    inner = {"left": 1, "right": 1}
    whole = True
    causal_rn_kind: Literal["linear", "quadratic"] = option(
        "linear", "linear: a running sum over tokens; quadratic: a sum over normalised pairs"
    )
    relation_width: int = option(
        0, "features in which tokens are compared; 0: hidden_size", smallest=0
    )

    @classmethod
    def features(cls, *, hidden_size: int, ffn_hidden_size: int, values: Any) -> int:
        return values["relation_width"] or hidden_size

    @classmethod
    def cost(cls, *, features: int, length: int, values: Any) -> tuple[int, int]:
        """Two multiply-adds per pair and feature: in the product that normalizes it, in its sum."""
        if values["causal_rn_kind"] == "linear":
            return 0, 0
        return 2 * length * (length + 1) * features, 4 * length * length * features

    def build(self, width: int, length: int) -> None:
        if self.causal_rn_kind == "quadratic" and width > WIDEST:
            raise ValueError(
                f"--relation-width {width} with --causal-rn-kind quadratic, whose exponentials may "
                f"overflow from {WIDEST + 1} on: give a smaller one, or --causal-rn-kind linear."
            )

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """left, right: <float>[B, T, F] -> <fp32>[B, T, F]."""
        a, b = normed(left), normed(right)
        return normed(_summed(a, b) if self.causal_rn_kind == "linear" else _pairwise(a, b))


def _summed(a: Tensor, b: Tensor) -> Tensor:
    """Return exp(a) times the mean of exp(b), up to a factor per token. Sums are in double, which
    holds exp() of n's output: a maximum over tokens would leak later ones into earlier rows."""
    sums = b.double().exp().cumsum(dim=1)
    exponents = a + (sums / counts(sums)).log().to(a.dtype)
    return (exponents - exponents.amax(dim=-1, keepdim=True)).exp()


def _pairwise(a: Tensor, b: Tensor) -> Tensor:
    """Return the mean of exp(n(a_t + b_s)), up to a factor per token.

    |a_t + b_s|^2 = |a_t|^2 + |b_s|^2 + 2 a_t b_s: the variances of pairs are one product. All pairs
    would take a tensor [T, T, F] per sample: rows are computed in blocks, and again in backward.
    """
    a, b = (part - part.mean(-1, keepdim=True) for part in (a, b))
    rows, columns = (part.square().sum(-1) for part in (a, b))
    squares = rows[:, :, None] + columns[:, None] + 2 * torch.einsum("btf,bsf->bts", a, b)
    scales = torch.rsqrt((squares / a.shape[-1]).clamp(min=0) + EPS)
    count, step = a.shape[1], max(1, BLOCK // (a.shape[1] * a.shape[2]))
    sums = [
        torch.cat([
            checkpoint(_block, *one, start, min(start + step, count), use_reentrant=False)
            for start in range(0, count, step)
        ])
        for one in zip(a, b, scales, strict=True)
    ]  # fmt: skip
    return torch.stack(sums) / counts(a)


def _block(a: Tensor, b: Tensor, scales: Tensor, start: int, stop: int) -> Tensor:
    """a, b: <fp32>[T, F]; scales: <fp32>[T, T] -> sums over s <= t, for rows start to stop."""
    pairs = (a[start:stop, None] + b[None, :stop]) * scales[start:stop, :stop, None]
    later = torch.ones(pairs.shape[:2], dtype=torch.bool, device=a.device).triu(1 + start)
    return pairs.exp().masked_fill(later[..., None], 0.0).sum(dim=1)


register.architecture("causal_rn", mixer="causal_rn", channel="mlp")
