"""Hosts a plugin's routers (megatron_smlp/plugins.py): a token router in Megatron's MoELayer, a
feature router in sMLP's sparse layers.

    s = h W      e = choose(s)      y = sum over the chosen e of weigh(s)_e f_e(h)

h <float>[n, D] tokens after the norm; W <float>[D, E], kept as [E, D]; s in fp32. `choose` sees the
whole routing group, a micro-batch, whatever the layout (token_router.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor, nn

from megatron_smlp import plugins
from megatron_smlp.plugin_weights import alike_on_ranks, on_cpu, own_weights
from megatron_smlp.routers.found import found
from megatron_smlp.routers.handed import repeats_a_pass
from megatron_smlp.routers.prefix import PrefixRouter
from megatron_smlp.routers.token_router import Choices, MegatronTokenRouter

AUX_LOSS = "load_balancing_loss"


def hosting(rule: type[plugins.TokenRouter]) -> type[HostedRouter]:
    """Return the router class that hosts a rule."""
    attributes = {"kind": rule, "skips": rule.may_skip}
    return type(f"Hosted{rule.__name__}", (HostedRouter,), attributes)


class HostedRouter(MegatronTokenRouter):
    """See the top of the file."""

    kind: type[plugins.TokenRouter]
    has_aux_loss = False  # a rule's own loss has no uniform value to compare with

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        values = plugins.values_in(self.kind, config) | {"moe_router_topk": config.moe_router_topk}
        self.rule = on_cpu(lambda: self.kind(num_experts=self.num_experts, values=values))
        self.rule.to(self.weight.device)
        # Under sequence parallelism each rank scores its own tokens; otherwise all do the same.
        whole = not config.sequence_parallel
        own_weights(self.rule, dtype=config.params_dtype, group=self.tp_group, whole=whole)
        self.loads = torch.zeros(self.num_experts, dtype=torch.float64)
        self.buffers_before: list[Tensor] | None = None
        """The rule's, as they were before the current step; None: outside of a step."""

    def gating(self, input: Tensor) -> Tensor:
        """input: <float>[..., D] -> scores <fp32>[..., E]."""
        if self.kind.scores is plugins.TokenRouter.scores:
            return super().gating(input)
        return self.rule.scores(input, self.weight)

    def choose(self, scores: Tensor) -> Choices:
        """scores: <fp32>[N, E] of the group."""
        buffers = list(self.rule.buffers())
        if self.training and self.buffers_before is None:
            self.buffers_before = [buffer.clone() for buffer in buffers]
        before = [buffer.clone() for buffer in buffers] if repeats_a_pass() else []
        with alike_on_ranks(self.config, self):
            chosen, visited = self.rule.choices(scores)
        for buffer, value in zip(buffers, before, strict=False):
            buffer.copy_(value)  # the original pass has already updated them
        if not self.skips and chosen.shape[1] != self.rule.experts_per_token:
            raise ValueError(
                f"{self.kind.__name__}.choose gives a token {chosen.shape[1]} experts, but "
                f"experts_per_token is {self.rule.experts_per_token}: set it to match."
            )
        if self.training and not repeats_a_pass():
            self.loads = self.loads.to(chosen.device)
            # Counting the rows of a mask would make the host wait for the device.
            self.loads.index_add_(0, chosen.flatten(), visited.flatten().to(self.loads.dtype))
        return Choices(chosen, visited, visited)

    def weigh(self, scores: Tensor, wanted: Tensor) -> Tensor:
        return self.rule.weigh(scores, wanted)

    def balanced(self, probs: Tensor, scores: Tensor, wanted: Tensor) -> Tensor:
        """Attach the rule's loss: each TP rank has the whole group's; together they count once."""
        if not (self.training and torch.is_grad_enabled()):
            return probs
        # A rule may leave a weight unread, as one with fixed weights does W; with overlapped
        # reductions, Megatron expects a gradient of each.
        nothing = 0.0 * sum(parameter.float().sum() for parameter in self.parameters())
        probs = MoEAuxLossAutoScaler.apply(probs, nothing)
        coefficient = self.get_aux_loss_coeff("aux_loss")
        if not coefficient:
            return probs
        if self.config.sequence_parallel:
            scores = gather_from_sequence_parallel_region(scores, group=self.tp_group)
        loss = self.rule.loss(scores, wanted)
        if loss is None:
            return probs
        share = coefficient * loss / (self.tp_group.size() if self.config.sequence_parallel else 1)
        return self.attach_and_log_load_balancing_loss(
            probs, coefficient, share, AUX_LOSS, self.tp_cp_group
        )


def hosting_features(rule: type[plugins.FeatureRouter]) -> type[HostedFeatureRouter]:
    """Return the router class that hosts a rule of feature routing."""
    return type(f"Hosted{rule.__name__}", (HostedFeatureRouter,), {"kind": rule})


class HostedFeatureRouter(PrefixRouter):
    """A plugin's feature router in place of W_r (prefix.py)."""

    kind: type[plugins.FeatureRouter]

    def build(self) -> None:
        values = plugins.values_in(self.kind, self.config)
        sizes = {"num_experts": self.num_experts, "prefix_length": self.prefix_length}
        self.rule = on_cpu(lambda: self.kind(**sizes, values=values))
        own_weights(self.rule, dtype=self.config.params_dtype, group=self.tp_group)

    def scores(self, means: Tensor) -> Tensor:
        return self.rule.scores(means.transpose(0, 1))

    def chosen(self, scores: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        experts = self.rule.choose(scores.detach())
        return experts, self.rule.weigh(scores, experts)


def update_rules(models: Iterable[nn.Module], *, skipped: bool) -> None:
    """Call each rule's `update` after a step, with loads and buffers of all data parallel ranks.

    Args:
        skipped: the step skipped its weight update, and so skips those of the rules.
    """
    if not (routers := found(models, HostedRouter)):
        return
    group = mpu.get_data_parallel_group(with_context_parallel=True)
    for router in routers:
        loads, router.loads = router.loads, torch.zeros_like(router.loads)
        before, router.buffers_before = router.buffers_before, None
        buffers = list(router.rule.buffers())
        if skipped:
            for buffer, value in zip(buffers, before or (), strict=False):
                buffer.copy_(value)  # undoes what a batch without a finite loss left there
            continue
        torch.distributed.all_reduce(loads, group=group)
        for buffer in buffers:
            if buffer.is_floating_point():
                torch.distributed.all_reduce(buffer, group=group)
                buffer /= group.size()
        router.rule.update(loads.float())
