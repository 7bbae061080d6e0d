"""BASE: in training every expert gets equally many tokens (Lewis et al. 2021, arXiv 2103.16716).

    s = x . w_e                     e(i) maximises sum_i s[i, e(i)], each expert floor or ceil N/E
    y = sigmoid(x . w_e) f_e(LN x)  in evaluation e(i) = argmax s[i, :], nothing balanced or dropped

x <float>[D] is the residual stream, which is not normalized; --base-routing-input norm scores and
weighs by LN(x) instead. w_e <float>[E, D], orthogonal with gain 0.1. The choice has no gradient:
w_e learns only through the sigmoid. No loss is added. Since the assignment sees the whole
micro-batch, a token's expert in training depends on other tokens, including later ones; in
evaluation it does not.

Prices (not in the paper): the assignment has a price p_e for each expert, so that
argmax s[i, :] - p is nearly balanced. Their running mean over training, updated once per step,
is a buffer of the model; with --base-eval prices evaluation takes that argmax. It is causal, and
independent of the rest of the batch.

    p <- 0.95 p + 0.05 mean over the step's micro-batches of p     (initially the first step's own)

The gate (--base-gate price, not in the paper): the assignment does not change if any c_e is added
to the scores of expert e (p_e absorbs it), or any b_i to those of token i. Only the sigmoid depends
on these shifts, and learns them first, as all tokens of an expert pull the same way; once it is
near 0, nothing brings it back (docs/decisions/0080-gates-by-prices.md). With

    y = sigmoid(s_e - p_e - mean over j of (s_j - p_j)) f_e(LN x)
    e(i) = argmax s[i, :] - p  in evaluation

the gate does not depend on them either, and is at least 1/2 wherever a token gets the expert that
it prefers at these prices. p is the micro-batch's own in training, the running mean in evaluation.
No gradient flows through the assignment, and the scores' gradient loses its part along c_e, which
would shift them to no effect:

    dL/ds[i, e] <- dL/ds[i, e] - mean over the tokens j of dL/ds[j, e]

Unlike in the source (fairseq's `modules/base_layer.py`), E does not depend on the number of
processes, tokens are not shuffled between ranks (the group is a micro-batch), and the assignment is
ops/balanced_assignment.py, which always terminates. The source's expert is an extra layer besides
all FFNs, with ReLU, and its second matrix starts at zero; here it replaces an FFN, or follows
spatial gating, and is initialized and activated like all other experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from megatron.core import mpu
from torch import Tensor, nn

from megatron_smlp.ops.balanced_assignment import priced_assignment
from megatron_smlp.routers.found import found
from megatron_smlp.routers.handed import repeats_a_pass
from megatron_smlp.routers.token_router import Choices, MegatronTokenRouter

INIT_GAIN = 0.1
PRICE_MEMORY = 0.95


class BaseRouter(MegatronTokenRouter):
    """See the top of the file."""

    can_close = True  # an expert gets its share of the tokens, however low their scores
    prices: Tensor
    """<fp32>[E]."""
    own_prices: Tensor
    """<fp32>[E], in training those of the current micro-batch."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.gate_is_priced = getattr(config, "base_gate", "score") == "price"
        self.by_price = getattr(config, "base_eval", "greedy") == "prices"
        self.register_buffer("prices", torch.zeros(self.num_experts, device=self.weight.device))
        # Each expert's sum of prices over this step's micro-batches; last, their number.
        self.of_step = torch.zeros(self.num_experts + 1, dtype=torch.float64)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.config.perform_initialization:
            # QR exists in fp32, but not in half precision, which the weight may have.
            self.weight.data.copy_(nn.init.orthogonal_(torch.empty(self.weight.shape), INIT_GAIN))

    def choose(self, scores: Tensor) -> Choices:
        """Choose one expert per token; every choice is kept."""
        if self.training:
            # A step with scores that are not finite is detected, and ended, by its loss.
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
        """Return the sigmoid of the chosen expert's score, or of its lead at the prices."""
        if self.gate_is_priced:
            if self.training and scores.requires_grad:
                scores = scores.view_as(scores)
                scores.register_hook(self._without_shifts)
            scores = scores - (self.own_prices if self.training else self.prices)
            scores = scores - scores.mean(dim=1, keepdim=True)
        return scores.gather(1, wanted).sigmoid()

    def _without_shifts(self, gradient: Tensor) -> Tensor:
        """Subtract from this rank's gradient, <fp32>[n, E], its mean over the group's tokens."""
        total, count = gradient.sum(dim=0), len(gradient)
        if self.config.sequence_parallel:
            torch.distributed.all_reduce(total, group=self.tp_group)
            count *= self.tp_group.size()
        return gradient - total / count

    def _collect(self, prices: Tensor) -> None:
        """Add a micro-batch's prices to the step's: <fp32>[E], the same on all TP ranks."""
        if not repeats_a_pass():
            self.of_step = self.of_step.to(prices.device)
            self.of_step[:-1] += prices
            self.of_step[-1] += 1

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        """Keep the prices in fp32 when Megatron casts a model, including buffers, to bf16."""
        kept = self.prices
        module = super()._apply(fn, recurse)
        self.prices = kept.to(self.prices.device)
        return module


def update_prices(models: Iterable[nn.Module], *, skipped: bool) -> None:
    """Update every BASE router's prices after a step. Collective over data parallel ranks.

    An expert parallel group's ranks hold replicas of a router, and are data parallel ranks too.

    Args:
        skipped: the step skipped its weight update, and so skips that of the prices.
    """
    if not (routers := found(models, BaseRouter)):
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
