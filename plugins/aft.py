"""AFT, the attention-free Transformer's mixer (Zhai et al., arXiv 2105.14103).

    q, k, v = x Wq, x Wk, x Wv
    y_t = sigmoid(q_t) * sum over s <= t of exp(k_s + w_ts) v_s / sum over s <= t of exp(k_s + w_ts)
    out = y Wo

AFT-full learns w, one T x T matrix per layer, like gMLP's M; AFT-simple has w = 0, a running
average. Differences from the source (docs/decisions/0069): w is a full matrix, not a product of two
thin ones; w ~ U(-1e-3/T, 1e-3/T). Input positions are learned, as in a Transformer.

exp(k + w) = exp(k) exp(w): the sums are a triangular product of exp(w) with [exp(k) v | exp(k)]. No
maximum is subtracted: one over all tokens would leak later tokens into earlier rows. Exponents up
to 20 fit into fp32 and bf16, with room for what the gradients divide by. Sums with larger ones, up
to 300, are computed in double precision; with a large key, only the sums that contain it, so that
earlier rows and other samples do not depend on it.

Letters: B batch, T sequence, F features of this rank.
"""

from typing import Literal

import torch
from torch import Tensor

from megatron_smlp.plugins import TokenMixer, option, register

LARGEST = 20.0
"""The largest |k| and |w| for which the precision of the operands suffices."""


def draw(weight: Tensor) -> None:
    bound = 1e-3 / len(weight)
    weight.uniform_(-bound, bound).tril_()


@register("aft")
class AttentionFree(TokenMixer):
    inner = {"qkv": 3}
    aft_kind: Literal["full", "simple"] = option("full", "full: with w; simple: w is 0")

    def build(self, width: int, length: int) -> None:
        if self.aft_kind == "full":
            self.positions = self.parameter(length, length, cut=None, init=draw)

    def forward(self, qkv: Tensor) -> Tensor:
        """qkv: <float>[B, T, F, 3] -> <float>[B, T, F]."""
        query, key, value = (part.contiguous() for part in qkv.unbind(-1))
        if self.aft_kind == "simple":
            averages = ratio(grown(key, value, torch.float64).cumsum(dim=1)).to(value.dtype)
        else:
            averages = self.averages(key, value)
        return query.sigmoid() * averages

    def averages(self, key: Tensor, value: Tensor) -> Tensor:
        """key, value: <float>[B, T, F] -> their averages, in the precision of the values.

        On a GPU the host waits to learn whether there are large exponents.
        """
        count = key.shape[1]
        weight = self.positions()[:count, :count].tril()
        large = key.detach().abs() > LARGEST
        in_weight = in_key = False
        if not key.is_meta:  # a meta tensor has no values
            largest = weight.detach().abs().amax() > LARGEST
            in_weight, in_key = torch.stack([largest, large.any()]).tolist()
        if in_weight:
            return self._averages(key, value, weight, torch.float64)
        usual = torch.promote_types(key.dtype, torch.bfloat16)  # fp16 ends at exp(11): use fp32
        if not in_key:
            return self._averages(key, value, weight, usual)
        without = self._averages(key.masked_fill(large, 0), value, weight, usual)
        double = self._averages(key, value, weight, torch.float64)
        return torch.where(large.cumsum(dim=1) > 0, double, without)

    def _averages(self, key: Tensor, value: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Average with sums in this precision."""
        factors = weight.to(torch.promote_types(dtype, weight.dtype)).exp()
        return ratio(self.causal_product(factors, grown(key, value, dtype))).to(value.dtype)


def grown(key: Tensor, value: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(k) v and exp(k), side by side: <dtype>[B, T, 2 F]."""
    weights = key.to(dtype).exp()
    return torch.cat([weights * value.to(dtype), weights], dim=-1)


def ratio(sums: Tensor) -> Tensor:
    above, below = sums.chunk(2, dim=-1)
    return above / below


register.architecture("aft", mixer="aft", channel="mlp")
