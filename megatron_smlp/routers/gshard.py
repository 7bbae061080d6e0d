"""GShard: the two most probable experts of each token (Lepikhin et al. 2020, arXiv 2006.16668).

    p = softmax(h W)     g1 >= g2 the two largest p     y = (g1 f_1(h) + g2 f_2(h)) / (g1 + g2)
    in training the second expert is used with probability min(1, 2 g2 / (g1 + g2)), in evaluation
    always
    capacity  ceil(2 c ceil(N / E)) slots an expert; first choices take them before second ones
    loss      as Switch's, over first choices only

A weight is not raised if the other expert drops the token. A later token's first choice takes a
slot before an earlier one's second choice, under either drop policy. The source groups tokens by
device; here the group is a micro-batch. c is 1 in the sources; --gshard-second-expert has other
rules, two of them fairseq's (docs/decisions/0010). A token's draw is the same in every layout
(draws.py). Letters as in switch.py.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from megatron_smlp.routers.draws import uniform
from megatron_smlp.routers.found import found
from megatron_smlp.routers.handed import Handed
from megatron_smlp.routers.switch import SwitchRouter
from megatron_smlp.routers.token_router import Choices


class GShardRouter(SwitchRouter):
    """See the top of the file."""

    draws = True

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.second_expert = getattr(config, "gshard_second_expert", "paper")
        self.samples = Handed()
        """<int64>[B], keys of the micro-batch's samples; none: all rows are of one sample."""
        self.keys: Tensor | None = None

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See MegatronTokenRouter.forward."""
        self.keys = self.samples.take()
        return super().forward(input, padding_mask)

    def choose(self, scores: Tensor) -> Choices:
        """Return both choices of each token."""
        probabilities = scores.softmax(dim=-1)
        gates, wanted = probabilities.topk(2, dim=-1)
        asked = torch.ones_like(wanted, dtype=torch.bool)
        if self.training and self.second_expert != "all":
            if self.second_expert == "paper":
                gates = gates / gates.sum(dim=-1, keepdim=True)
            asked[:, 1] = self.draw(len(gates), gates.device) < 2 * gates[:, 1]
        return Choices(wanted, asked, self.kept(wanted, asked, probabilities))

    def draw(self, count: int, device: torch.device) -> Tensor:
        """Draw <fp32>[N] in [0, 1), N = count, for the rows of the group."""
        keys = self.keys
        if keys is None:
            keys = torch.zeros(1, dtype=torch.int64, device=device)
        assert self.layer_number is not None
        return uniform(keys, layer=self.layer_number, positions=count // len(keys))

    def weigh(self, scores: Tensor, wanted: Tensor) -> Tensor:
        """Return g1 / (g1 + g2) and g2 / (g1 + g2)."""
        gates = scores.softmax(dim=-1).gather(1, wanted)
        return gates / gates.sum(dim=-1, keepdim=True)

    def capacity(self, factor: float, num_tokens: int) -> int:
        """Return the slots of one expert, for both choices together."""
        return math.ceil(2 * factor * math.ceil(num_tokens / self.num_experts))


def attach_samples(model: nn.Module, keys: Tensor) -> None:
    """Hand the next micro-batch's keys, of draws.sample_keys, to the routers of this model, or
    stage."""
    for router in found([model], GShardRouter):
        router.samples.hand(keys)
