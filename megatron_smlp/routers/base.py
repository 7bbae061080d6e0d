"""BASE: in training every expert gets as many tokens (Lewis et al. 2021, arXiv 2103.16716).

    s = x . w_e                     e(i) maximises sum_i s[i, e(i)], each expert floor or ceil N/E
    y = sigmoid(x . w_e) f_e(LN x)  in evaluation e(i) = argmax s[i, :], nothing balanced or dropped

x <float>[D] is the residual stream, which is not normalised; --base-routing-input norm scores and
weighs by LN(x) instead. w_e <float>[E, D], orthogonal with gain 0.1. The choice has no gradient:
w_e learns through the sigmoid only. No loss is added. Since the assignment looks across the
micro-batch, in training a token's expert depends on other tokens, later ones included; in
evaluation it does not.

Prices (not in the paper): the assignment has a price p_e for each expert, so that
argmax s[i, :] - p is nearly balanced. Their running mean over the training, one update a step,
is a buffer of the model; with --base-eval prices evaluation takes that argmax. It is causal, and
independent of what else is in the batch.

    p <- 0.95 p + 0.05 mean over the step's micro-batches of p     (the first step's own at first)

The gate (--base-gate price, not in the paper): the assignment is the same whatever c_e is added to
the scores of expert e (p_e absorbs it) and whatever b_i to those of token i. The sigmoid alone
feels these, and learns them first, as all tokens of an expert pull the same way; where it is nearly
0 nothing brings it back (docs/decisions/0080-gates-by-prices.md). With

    y = sigmoid(s_e - p_e - mean over j of (s_j - p_j)) f_e(LN x)
    e(i) = argmax s[i, :] - p  in evaluation

it does not feel them either, and is 1/2 or more wherever a token gets the expert that it prefers at
these prices. p is the micro-batch's own in training, the mean that is kept in evaluation. No
gradient goes through the assignment, and of what comes to the scores the part along c_e, which
would move them for nothing, is taken away:

    dL/ds[i, e] <- dL/ds[i, e] - mean over the tokens j of dL/ds[j, e]

Unlike the source (fairseq's `modules/base_layer.py`), E is free of the number of processes, tokens
are not shuffled between ranks (the group is a micro-batch), and the assignment is
ops/balanced_assignment.py, which always ends. The source's expert is a layer of its own beside all
FFNs, with ReLU, and its second matrix starts at zero; here it takes the place of an FFN, or follows
spatial gating, and is initialised and activated as all other experts are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from megatron.core import mpu
from torch import Tensor, nn

from megatron_smlp.ops.balanced_assignment import priced_assignment
from megatron_smlp.routers.handed import repeats_a_pass
from megatron_smlp.routers.token_router import Choices, TokenRouter

INIT_GAIN = 0.1
PRICE_MEMORY = 0.95


class BaseRouter(TokenRouter):
    """See the top of the file."""

    can_close = True  # an expert gets its share of the tokens, however low it scores them
    prices: Tensor
    """<fp32>[E]."""
    own_prices: Tensor
    """<fp32>[E], in training those of the micro-batch under way."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.gate_is_priced = getattr(config, "base_gate", "score") == "price"
        self.by_price = getattr(config, "base_eval", "greedy") == "prices"
        self.register_buffer("prices", torch.zeros(self.num_experts, device=self.weight.device))
        # Row by row the sum of the prices of this step's micro-batches; last, their number.
        self.of_step = torch.zeros(self.num_experts + 1, dtype=torch.float64)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.config.perform_initialization:
            # QR exists in fp32, not in the half precision that the weight may have.
            self.weight.data.copy_(nn.init.orthogonal_(torch.empty(self.weight.shape), INIT_GAIN))

    def choose(self, scores: Tensor) -> Choices:
        """One expert of each token; every choice is kept."""
        if self.training:
            # A step whose scores are not finite is found, and ended, by its loss.
            wanted, prices = priced_assignment(scores.nan_to_num())
            self.own_prices = prices
            self._collect(prices)
        elif self.by_price or self.gate_is_priced:
            wanted = (scores - self.prices).argmax(dim=-1)
        else:
            wanted = scores.argmax(dim=-1)
        every = torch.ones_like(wanted[:, None], dtype=torch.bool)
        return Choices(wanted[:, None], every, every)

    def weigh(self, scores: Tensor, wanted: Tensor) -> Tensor:
        """sigmoid of the chosen expert's score, or of its lead at the prices."""
        if self.gate_is_priced:
            if self.training and scores.requires_grad:
                scores = scores.view_as(scores)
                scores.register_hook(self._without_shifts)
            scores = scores - (self.own_prices if self.training else self.prices)
            scores = scores - scores.mean(dim=1, keepdim=True)
        return scores.gather(1, wanted).sigmoid()

    def _without_shifts(self, gradient: Tensor) -> Tensor:
        """gradient: <fp32>[n, E] of this rank's tokens, less its mean over those of the group."""
        total, count = gradient.sum(dim=0), len(gradient)
        if self.config.sequence_parallel:
            torch.distributed.all_reduce(total, group=self.tp_group)
            count *= self.tp_group.size()
        return gradient - total / count

    def _collect(self, prices: Tensor) -> None:
        """Add a micro-batch to the step's; prices: <fp32>[E], the same on all TP ranks."""
        if not repeats_a_pass():
            self.of_step = self.of_step.to(prices.device)
            self.of_step[:-1] += prices
            self.of_step[-1] += 1

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        """Keep the prices in fp32 where Megatron casts a model, buffers and all, to bf16."""
        kept = self.prices
        module = super()._apply(fn, recurse)
        self.prices = kept.to(self.prices.device)
        return module


def _routers(models: Iterable[nn.Module]) -> list[BaseRouter]:
    modules = (module for model in models for module in model.modules())
    return [module for module in modules if isinstance(module, BaseRouter)]


def update_prices(models: Iterable[nn.Module], *, skipped: bool) -> None:
    """After a step: one update of every BASE router's prices. Collective over data parallel ranks.

    The routers of an expert parallel group are copies of each other, and belong to that group.

    Args:
        skipped: the step had no update of the weights, and has none of the prices.
    """
    if not (routers := _routers(models)):
        return
    sums = torch.stack([router.of_step for router in routers])
    group = mpu.get_data_parallel_group(with_context_parallel=True)
    torch.distributed.all_reduce(sums, group=group)
    for router, row in zip(routers, sums, strict=True):
        router.of_step.zero_()
        if not skipped:
            mean = (row[:-1] / row[-1]).float()
            has_started = router.prices.any()
            router.prices.lerp_(mean, torch.where(has_started, 1 - PRICE_MEMORY, 1.0))
