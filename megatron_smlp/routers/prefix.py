"""Partial prediction: the prefix of a sample routes its chunks of features to spatial experts.

    a_i = sum over t < P of  W_r[t] m_i[t]          m_i[t] mean of chunk i of u2[t]
    p_i = softmax(a_i)        e(i) = argmax p_i        s_i = E p_i[e(i)]      (1 where p is uniform)
    rows t < P, which must not see all of the prefix:  e(i) = i mod E        s_i = 1
    loss  a E sum_e f_e P_e,  f_e share of the (sample, chunk) choices of e, P_e mean of p_e

Yu et al., arXiv 2203.06850, section 3; the details are ours (docs/decisions/0006). W_r: P x E.
layers/feature_moe.py routes the rows t < P; partial_prediction.py says what is trained on. s_i
multiplies the mixed values; otherwise W_r would get no gradient. a: --feature-aux-loss-coeff.

Letters: T tokens, B batch, C chunks, C' = C / tp chunks of this rank, E experts, P prefix length.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_smlp.routers.balance_loss import balance_loss
from megatron_smlp.routers.statistics import CountedRouter


class Choice(NamedTuple):
    """The expert of each chunk of each sample, and its weight."""

    experts: Tensor
    """<int64>[B, C']."""
    scale: Tensor
    """<fp32>[B, C'], with gradient."""


class PrefixRouter(CountedRouter, nn.Module):
    """See the top of the file. Every rank of a TP group routes its own chunks by the same W_r.

    Args:
        prefix_length: P.
        num_experts: E.
    """

    router_kind = "feature"
    has_aux_loss = True

    def __init__(
        self,
        config: TransformerConfig,
        *,
        layer_number: int,
        prefix_length: int,
        num_experts: int,
        loss_coeff: float,
        tp_group: torch.distributed.ProcessGroup,
    ) -> None:
        super().__init__()
        self.config, self.tp_group, self.layer_number = config, tp_group, layer_number
        self.num_experts, self.loss_coeff = num_experts, loss_coeff
        self.prefix_length = prefix_length
        self.build()

    def build(self) -> None:
        """Make W_r."""
        config, shape = self.config, (self.prefix_length, self.num_experts)
        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self.weight = nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=device))
        if config.perform_initialization:
            drawn = torch.empty(shape, device="cpu")
            config.init_method(drawn)  # from the CPU generator, the same on all ranks
            self.weight.data.copy_(drawn)

    def scores(self, means: Tensor) -> Tensor:
        """means: <fp32>[P, B, C'] -> a, <fp32>[B, C', E]."""
        weight = tensor_parallel.copy_to_tensor_model_parallel_region(self.weight, self.tp_group)
        return torch.einsum("tbc,te->bce", means, weight.float())

    def chosen(self, scores: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """Return e(i), <int64>[B, C'], and s_i, <fp32>[B, C'], from scores and p, [B, C', E]."""
        largest, experts = probabilities.max(dim=-1)
        return experts, largest * self.num_experts

    def forward(self, means: Tensor) -> Choice:
        """means: <fp32>[T, B, C'] of the chunks of u2, T >= P."""
        scores = self.scores(means[: self.prefix_length].float())
        probabilities = scores.softmax(dim=-1)
        experts, scale = self.chosen(scores, probabilities)
        attaches = self.training and torch.is_grad_enabled() and bool(self.loss_coeff)
        if not (attaches or self.counts):
            return Choice(experts, scale)
        part = self._balance_loss(probabilities.flatten(0, 1), experts.flatten())
        self._count(experts.flatten(), scale.detach(), part.detach())
        if attaches:
            loss = self.loss_coeff * part
            if self.config.calculate_per_token_loss:
                # Megatron then divides by tokens instead of by micro-batches.
                loss = loss * means.shape[0] * means.shape[1]
            scale = MoEAuxLossAutoScaler.apply(scale, loss)
        return Choice(experts, scale)

    def _count(self, experts: Tensor, scale: Tensor, loss_part: Tensor) -> None:
        """Count this rank's pairs of sample and chunk; experts: <int64>[M]."""
        if self.counts:
            assert self.counter is not None
            self.counter.add(
                training=self.training,
                experts=experts,
                asked=torch.ones_like(experts, dtype=torch.bool),
                kept=len(experts),
                gate=scale.sum(),
                gates=len(experts),
                aux_loss=loss_part,
                groups=int(self.tp_group.rank() == 0),  # every rank has a part of it
            )

    def _balance_loss(self, probabilities: Tensor, experts: Tensor) -> Tensor:
        """Return this rank's chunks' part of the loss over all TP ranks; gradients are summed."""
        everywhere = experts
        if self.tp_group.size() > 1:
            parts = [torch.empty_like(experts) for _ in range(self.tp_group.size())]
            torch.distributed.all_gather(parts, experts, group=self.tp_group)
            everywhere = torch.cat(parts)
        return balance_loss(probabilities, everywhere)
