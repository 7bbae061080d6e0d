"""The weighted average of AFT-full (Zhai et al., arXiv 2105.14103), by two triangular products.

    y[t, n] = sum over s <= t of exp(k[s, n] + w[t, s]) v[s, n]
              / sum over s <= t of exp(k[s, n] + w[t, s])

Letters: T tokens, B batch, F features.

exp(k + w) = exp(k) exp(w): the sums are `causal_mix` of exp(w) with [exp(k) v | exp(k)]. No maximum
is taken out, for a maximum of k over all tokens would let later ones reach earlier rows; and where
k and w are large and of opposite signs, neither maximum is near that of their sums, so that nothing
but zeros may be left. Exponents up to 20 fit into fp32 and bf16 with room for what the gradients
divide by; sums with larger ones, up to 300, are computed in double precision: those in which a
large key is, so that earlier rows and other samples do not depend on it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_smlp.ops.causal_mix import causal_mix

LARGEST = 20.0
"""|k| and |w| up to which the precision of the operands will do."""


def aft_mix(keys: Tensor, values: Tensor, weight: Tensor) -> Tensor:
    """Average the values of earlier tokens.

    keys, values: <float>[T, B, F]; weight: <float>[T, T], w, of which what lies above the diagonal
        is not read: its gradient is zero.
    Returns <float>[T, B, F] in the precision of the values. On a GPU the host waits for whether
    there are large exponents.
    """
    weight = weight.tril()
    large = keys.detach().abs() > LARGEST
    is_in = torch.stack([weight.detach().abs().amax() > LARGEST, large.any()])
    is_in_weight, is_in_keys = is_in.tolist()
    if is_in_weight:
        return _averages(keys, values, weight, torch.float64)
    usual = torch.promote_types(keys.dtype, torch.bfloat16)  # fp16 ends at exp(11): then fp32
    if not is_in_keys:
        return _averages(keys, values, weight, usual)
    without = _averages(keys.masked_fill(large, 0), values, weight, usual)
    return torch.where(
        large.cumsum(dim=0) > 0, _averages(keys, values, weight, torch.float64), without
    )


def _averages(keys: Tensor, values: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Average by sums of this precision."""
    grown = keys.to(dtype).exp()
    columns = torch.cat([grown * values.to(dtype), grown], dim=-1)
    factors = weight.to(torch.promote_types(dtype, weight.dtype)).exp()
    sums = causal_mix(factors[None], columns.flatten(1)[None])
    above, below = sums.view_as(columns).chunk(2, dim=-1)
    return (above / below).to(values.dtype)


def aft_mix_reference(keys: Tensor, values: Tensor, weight: Tensor) -> Tensor:
    """Compute `aft_mix` slowly: a softmax over all earlier tokens, for each feature."""
    exponents = weight[:, :, None, None] + keys  # [T, T, B, F]
    later = torch.ones_like(weight, dtype=torch.bool).triu(1)
    shares = exponents.masked_fill(later[:, :, None, None], -torch.inf).softmax(dim=1)
    return (shares * values).sum(dim=1)
