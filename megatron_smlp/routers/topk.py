"""Top-k routing with Megatron's own router, as in modern MoE models.

    s_e = softmax(h W)_e or sigmoid(h w_e)        the k experts of the largest s_e + b_e
    w_e = c s_e / sum over the chosen of s        (k = 1: c s_e)
    loss   a E sum_e f_e P_e,   f_e share of the k N choices by s alone, P_e mean of s_e / sum s
    b_e    += u sign(mean load - load_e) after each step, of the global batch; without it b = 0;
           unchanged if the step's update was skipped

h <float>[n, D] tokens after the norm; W <float>[D, E], kept as [E, D], without bias. k:
--moe-router-topk; sigmoid: --moe-router-score-function; c: --moe-router-topk-scaling-factor; a:
--moe-aux-loss-coeff; b: --moe-router-enable-expert-bias, u: --moe-router-bias-update-rate. With
--moe-router-num-groups G and --moe-router-group-topk g, the k are chosen in g of G groups of
consecutive experts, those with the largest sums of their k / g best. Softmax over the chosen scores
is Mixtral's (arXiv 2401.04088); sigmoid, b, groups and shared experts are DeepSeek-V3's
(2412.19437; b: 2408.15664; shared experts, layers/token_moe.py: 2401.06066). Unlike in DeepSeek-V3,
nothing else balances a model with b unless --moe-router-load-balancing-type aux_loss says so.
Nothing is dropped.

Megatron-Core's TopKRouter computes choice, weights, loss and b, each rank for its own tokens; this
module counts them like those of our other rules, and likewise keeps scores in fp32.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from megatron.core.transformer.moe.moe_utils import (
    compute_routing_scores_for_aux_loss,
    topk_routing_with_score_function,
)
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn

from megatron_smlp.routers.found import found
from megatron_smlp.routers.token_router import Choices, MegatronTokenRouter


class TopKTokenRouter(MegatronTokenRouter):
    """Megatron's router, counted; see the top of the file."""

    has_aux_loss = True
    bias_before: Tensor | None = None
    """<fp32>[E], b before the current training step; None: outside of a step, or without b."""

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See MegatronTokenRouter.forward; here Megatron's own router routes."""
        return TopKRouter.forward(self, input, padding_mask)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Route and count; logits: <fp32>[T or T / TP, B, E]."""
        if self.training and self.bias_before is None and self.expert_bias is not None:
            self.bias_before = self.expert_bias.clone()
        if self.counts:
            with torch.no_grad():
                whole = self.of_group(logits.detach().flatten(0, 1))
                self.count(self.choose(whole), whole)
        return TopKRouter.routing(self, logits, padding_mask)

    def choose(self, scores: Tensor) -> Choices:
        """Return the k experts of each token, the one with the largest weight first."""
        weights, experts = self._top(scores)
        wanted = experts.gather(1, weights.argsort(dim=1, descending=True, stable=True))
        everything = torch.ones_like(wanted, dtype=torch.bool)
        return Choices(wanted, everything, everything)

    def weigh(self, scores: Tensor, wanted: Tensor) -> Tensor:
        return self._top(scores, wanted)[0]

    def aux_loss(self, scores: Tensor, first: Tensor) -> Tensor:
        """Return the balance loss over all k choices, not only the first."""
        chosen, shares = compute_routing_scores_for_aux_loss(scores, self.topk, self.score_function)
        loads = chosen.float().sum(dim=0) / max(1, len(scores) * self.topk)
        return self.num_experts * (loads * shares.mean(dim=0)).sum()

    def _maintain_float32_expert_bias(self) -> None:
        """Keep the step's counts in fp32 too: in 16 bits they would be rounded, or overflow."""
        super()._maintain_float32_expert_bias()
        if self.local_tokens_per_expert is not None:
            self.local_tokens_per_expert.data = self.local_tokens_per_expert.data.float()

    def _top(self, scores: Tensor, wanted: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return weights <fp32>[N, k] and experts <int64>[N, k], or those of `wanted`."""
        return topk_routing_with_score_function(
            scores,
            self.topk,
            use_pre_softmax=self.config.moe_router_pre_softmax,
            num_groups=self.config.moe_router_num_groups,
            group_topk=self.config.moe_router_group_topk,
            scaling_factor=self.config.moe_router_topk_scaling_factor,
            score_function=self.score_function,
            expert_bias=self.expert_bias,
            dense_output=True,
            precomputed_indices=wanted,
        )


def hold_biases(models: Iterable[nn.Module], *, skipped: bool) -> None:
    """Restore the biases after a skipped step: Megatron moved them when it reduced gradients.

    Args:
        skipped: the step skipped its weight update, and so skips that of the biases.
    """
    for router in found(models, TopKTokenRouter):
        before, router.bias_before = router.bias_before, None
        if skipped and before is not None:
            router.expert_bias.copy_(before)
