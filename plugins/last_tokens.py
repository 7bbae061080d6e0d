"""Feature routing by a decaying average of the prefix: its last tokens count most.

a_i = w_e * sum over t < P of r^(P - 1 - t) m_i[t] + b_e,   r = sigmoid(c): two numbers an expert

m_i[t] mean of chunk i at token t, P prefix length. Partial prediction learns a weight for each
token and expert instead (megatron_smlp/routers/prefix.py).
"""

import torch
from torch import Tensor

from megatron_smlp.plugins import FeatureRouter, normal, register, zeros


@register("last_tokens")
class LastTokens(FeatureRouter):
    def build(self, prefix_length: int, num_experts: int) -> None:
        self.slope = self.parameter(num_experts, init=normal(1.0))
        self.start = self.parameter(num_experts, init=zeros)
        self.decay = self.parameter(1, init=zeros)

    def scores(self, means: Tensor) -> Tensor:
        count = means.shape[1]
        ages = torch.arange(count - 1, -1, -1, device=means.device, dtype=means.dtype)
        shares = self.decay().to(means.dtype).sigmoid() ** ages
        average = torch.einsum("bpc,p->bc", means, shares)
        slope, start = self.slope().to(means.dtype), self.start().to(means.dtype)
        return average[..., None] * slope + start
