"""Switch: one expert per token, the most probable one (Fedus et al. 2021, arXiv 2101.03961).

    p = softmax(h W)        e = argmax p        y = p_e f_e(h)
    capacity  ceil(c N / E) slots an expert; what overflows passes by the residual
    loss      a E sum_e f_e P_e,   f_e share of the N tokens whose argmax is e, before any drop,
                                   P_e mean of p_e over them; 1 where uniform

h <float>[n, D] tokens after the norm; W <float>[D, E], kept as [E, D], without bias, drawn as the
other weights are (token_router.py). c: --moe-train-capacity-factor in training, else
--moe-eval-capacity-factor; a: --moe-aux-loss-coeff. Unlike in the source, no jitter; its smaller
init (section 2.4: the variance of all weights, not of W alone, times 0.1) is --init-method-std.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_smlp.routers.balance_loss import balance_loss
from megatron_smlp.routers.token_router import Choices, MegatronTokenRouter


def within_capacity(
    wanted: Tensor, asking: Tensor, priority: Tensor, *, capacity: int, num_experts: int
) -> Tensor:
    """Select the choices that get a slot of their expert. First choices come before second ones.

    wanted: <int64>[N, k]; asking: <bool>[N, k], which of them take part; priority: <float>[N, k],
    the largest comes first, ties are broken by position: constant for drop policy `position`, the
    router's probabilities for `probs`.
    Returns <bool>[N, k].
    """
    order = priority.T.argsort(dim=1, descending=True, stable=True)
    rank_start = len(wanted) * torch.arange(wanted.shape[1], device=wanted.device)
    order = (order + rank_start[:, None]).flatten()
    asked = torch.where(asking, wanted, num_experts).T.flatten()[order]
    # Sorted by expert, then by rank: N k numbers, where a table of all experts has E times as many.
    experts, queue = asked.sort(stable=True)
    place = torch.arange(len(queue), device=queue.device) - torch.searchsorted(experts, experts)
    kept = torch.empty_like(order, dtype=torch.bool)
    kept[order[queue]] = place < capacity
    return kept.unflatten(0, (wanted.shape[1], -1)).T & asking


class SwitchRouter(MegatronTokenRouter):
    """See the top of the file; GShard differs in the choice and in the number of slots."""

    has_aux_loss = True

    def choose(self, scores: Tensor) -> Choices:
        """Return one choice per token."""
        probabilities = scores.softmax(dim=-1)
        wanted = probabilities.argmax(dim=-1, keepdim=True)
        asked = torch.ones_like(wanted, dtype=torch.bool)
        return Choices(wanted, asked, self.kept(wanted, asked, probabilities))

    def weigh(self, scores: Tensor, wanted: Tensor) -> Tensor:
        """Return p of the chosen expert."""
        return scores.softmax(dim=-1).gather(1, wanted)

    def kept(self, wanted: Tensor, asked: Tensor, probabilities: Tensor) -> Tensor:
        """Return which of the asked choices fit, <bool>[N, k]; probabilities: <fp32>[N, E]."""
        config = self.config
        factor = (
            config.moe_train_capacity_factor if self.training else config.moe_eval_capacity_factor
        )
        if factor is None:
            return asked
        priority = probabilities.gather(1, wanted)
        if config.moe_token_drop_policy == "position":
            priority = torch.zeros_like(priority)
        capacity = self.capacity(factor, len(wanted))
        return within_capacity(
            wanted, asked, priority, capacity=capacity, num_experts=self.num_experts
        )

    def capacity(self, factor: float, num_tokens: int) -> int:
        """Return the slots of one expert."""
        return math.ceil(factor * num_tokens / self.num_experts)

    def balanced(self, probs: Tensor, scores: Tensor, wanted: Tensor) -> Tensor:
        """Attach the balance loss: each TP rank its tokens' part; the gradients are summed."""
        coefficient = self.get_aux_loss_coeff("aux_loss")
        if not (self.training and torch.is_grad_enabled() and coefficient):
            return probs
        share = balance_loss(scores.softmax(dim=-1), wanted[:, 0])
        return self.attach_and_log_load_balancing_loss(
            probs, coefficient, coefficient * share, "load_balancing_loss", self.tp_cp_group
        )

    def aux_loss(self, scores: Tensor, first: Tensor) -> Tensor:
        return balance_loss(scores.softmax(dim=-1), first)
