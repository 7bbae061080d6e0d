"""Expert choice by a threshold, the router of docs/own-router.md.

training      expert e takes the N / E tokens of the micro-batch with its highest scores s_e
evaluation    it takes those with s_e > b_e, b_e the running mean of the lowest score that it took
weight        sigmoid(s_e)

A token visits any number of experts, one on average. In training it is chosen among the others of
its micro-batch (Zhou et al., arXiv 2202.09368); the threshold keeps evaluation causal.
"""

import torch
from torch import Tensor

from megatron_smlp.plugins import TokenRouter, option, register


@register("threshold")
class Threshold(TokenRouter):
    may_skip = True
    memory: float = option(0.9, "share of b that a step keeps", smallest=0.0, may_change=True)

    def __init__(self, **host) -> None:
        super().__init__(**host)
        self.register_buffer("bound", torch.zeros(self.num_experts))
        # Sums over the step's micro-batches: the lowest scores, and how many there were.
        self.register_buffer("lowest", torch.zeros(self.num_experts), persistent=False)
        self.register_buffer("count", torch.zeros(1), persistent=False)

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        experts = torch.arange(self.num_experts, device=scores.device).expand_as(scores)
        if not self.training:
            return experts, scores > self.bound
        lowest = scores.topk(max(1, len(scores) // self.num_experts), dim=0).values[-1]
        self.lowest += lowest
        self.count += 1
        return experts, scores >= lowest

    def weigh(self, scores: Tensor, chosen: Tensor) -> Tensor:
        return scores.gather(1, chosen).sigmoid()

    def update(self, loads: Tensor) -> None:
        self.bound.lerp_(self.lowest / self.count, 1 - self.memory)
        self.lowest.zero_()
        self.count.zero_()
