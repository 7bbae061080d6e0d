"""GShard: the two most probable experts of each token (Lepikhin et al. 2020, arXiv 2006.16668).

    p = softmax(h W)     g1 >= g2 the two largest p     y = (g1 f_1(h) + g2 f_2(h)) / (g1 + g2)
    in training the second expert is used with probability min(1, 2 g2), in evaluation always
    capacity  ceil(2 c ceil(N / E)) slots an expert; first choices take them before second ones
    loss      as Switch's, over first choices only

A weight is not raised where the other expert drops the token. A later token's first choice takes a
slot before an earlier one's second choice, under either drop policy. W is initialised as the other
weights are. Letters as in switch.py; the source groups tokens by device, here the group is a
micro-batch. The draw reads g2 as it is, which the source divides by g1 + g2 before
(docs/decisions/0010).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_smlp.routers.switch import SwitchRouter
from megatron_smlp.routers.token_router import Choices, TokenRouter


class GShardRouter(SwitchRouter):
    """See the top of the file."""

    def reset_parameters(self) -> None:
        TokenRouter.reset_parameters(self)

    def choose(self, scores: Tensor) -> Choices:
        """Both choices of each token."""
        probabilities = scores.softmax(dim=-1)
        gates, wanted = probabilities.topk(2, dim=-1)
        asked = torch.ones_like(wanted, dtype=torch.bool)
        if self.training:
            asked[:, 1] = self.draw(gates[:, 1]) < 2 * gates[:, 1]
        return Choices(wanted, asked, self.kept(wanted, asked, probabilities))

    def draw(self, gates: Tensor) -> Tensor:
        """gates: <fp32>[N] -> numbers in [0, 1), the same on every rank of the TP group.

        As with dropout, other data parallel ranks or micro-batches draw others.
        """
        return torch.rand_like(gates)

    def weigh(self, scores: Tensor, wanted: Tensor) -> Tensor:
        """g1 / (g1 + g2) and g2 / (g1 + g2)."""
        gates = scores.softmax(dim=-1).gather(1, wanted)
        return gates / gates.sum(dim=-1, keepdim=True)

    def capacity(self, factor: float, num_tokens: int) -> int:
        """Slots of one expert, for both choices together."""
        return math.ceil(2 * factor * math.ceil(num_tokens / self.num_experts))
