"""The base of all token routers: scores in fp32, one routing group, Megatron's output format.

A routing group is a micro-batch, whatever the layout: under tensor parallelism each rank holds a
slice of its tokens (sequence parallelism), so the scores are gathered over the TP group; every rank
makes the same choices for all N tokens and keeps its own n rows. Rows are ordered by position, then
by sample.

All rules draw W from a normal distribution with --init-method-std, like all other weights, unless
the source has a different rule for W alone, as BASE's has.

Letters: N tokens of the group, n tokens of this rank, E experts, k choices of a token, D hidden,
T sequence length, B micro-batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.moe.moe_utils import router_gating_linear
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_smlp.routers.collapse import CLOSED_GATE
from megatron_smlp.routers.statistics import CountedRouter


class Choices(NamedTuple):
    """The choices of a routing group."""

    wanted: Tensor
    """<int64>[N, k], experts, distinct within a row."""
    asked: Tensor
    """<bool>[N, k], which of them the rule sends; it does not use the others."""
    kept: Tensor
    """<bool>[N, k], which of those found a slot."""


class MegatronTokenRouter(CountedRouter, TopKRouter):
    """A rule chooses the experts of a token (`choose`) and their weights (`weigh`).

    Megatron's z-loss applies to the scores; its own top-k, capacity and balance losses do not.
    """

    router_kind = "token"
    skips = False
    """Whether tokens may visit fewer than k experts even without a capacity."""
    draws = False
    """Whether random draws (see `attach_samples`) decide which choices are sent."""

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Route the tokens of this rank.

        Args:
            input: <float>[T or T / TP, B, D].
            padding_mask: Megatron's; here no batch has padding.

        Returns:
            Weights <fp32>[n, E], 0 where a token is not sent; and where it is sent, <bool>[n, E].
        """
        scores = self.apply_z_loss(self.gating(input).flatten(0, 1))
        whole = self.of_group(scores.detach())
        with torch.no_grad():
            choices = self.choose(whole)
        self.count(choices, whole)
        wanted, kept = choices.wanted, choices.kept
        rows = self.own_rows(len(scores))
        weights = self.weigh(scores, wanted[rows])
        probs, routing_map = as_megatron(weights, wanted[rows], kept[rows], self.num_experts)
        return self.balanced(probs, scores, wanted), routing_map

    def gating(self, input: Tensor) -> Tensor:
        """input: <float>[..., D] -> scores <fp32>[..., E], whatever the model's precision."""
        return router_gating_linear(input, self.weight, None, torch.float32)

    def choose(self, scores: Tensor) -> Choices:
        """scores: <fp32>[N, E] of the group."""
        raise NotImplementedError

    def weigh(self, scores: Tensor, wanted: Tensor) -> Tensor:
        """scores: <fp32>[n, E]; wanted: <int64>[n, k] -> weights <fp32>[n, k], with gradient."""
        raise NotImplementedError

    def balanced(self, probs: Tensor, scores: Tensor, wanted: Tensor) -> Tensor:
        """Attach a balance loss to `probs`, for the rules that have one.

        scores: <fp32>[n, E] of this rank; wanted: <int64>[N, k], choices of the group.
        """
        return probs

    def aux_loss(self, scores: Tensor, first: Tensor) -> Tensor | float:
        """Return the balance loss of a whole group, without its coefficient, for the statistics.

        scores: <fp32>[N, E]; first: <int64>[N].
        """
        return 0.0

    @property
    def has_z_loss(self) -> bool:
        return bool(self.config.moe_z_loss_coeff)

    @torch.no_grad()
    def count(self, choices: Choices, scores: Tensor) -> None:
        """Add a group to the statistics; scores: <fp32>[N, E].

        All ranks of a TP group make the same choices, so only the first one counts them.
        """
        if not self.counts or self.tp_group.rank() != 0:
            return
        assert self.counter is not None
        weights = self.weigh(scores, choices.wanted)
        gates = weights[:, 0]
        if self.skips:  # the first visited choice's; 0 without one
            first_asked = choices.asked.int().argmax(dim=1, keepdim=True)
            gates = (weights * choices.asked).gather(1, first_asked)[:, 0]
        self.counter.add(
            training=self.training,
            experts=choices.wanted.flatten(),
            asked=choices.asked.flatten(),
            kept=choices.kept.sum(),
            gate=gates.sum(),
            gates=len(gates),
            closed=(gates < CLOSED_GATE).sum() if self.can_close else 0.0,
            aux_loss=self.aux_loss(scores, choices.wanted[:, 0]),
            z_loss=scores.logsumexp(dim=-1).square().sum() if self.has_z_loss else 0.0,
            groups=1,
        )

    def of_group(self, rows: Tensor) -> Tensor:
        """Gather the rows of this rank, [n, ...], to those of the whole group, [N, ...]."""
        if not self.config.sequence_parallel:
            return rows
        return gather_from_sequence_parallel_region(rows, group=self.tp_group)

    def own_rows(self, count: int) -> slice:
        """Return the place of this rank's `count` rows within the group."""
        rank = self.tp_group.rank() if self.config.sequence_parallel else 0
        return slice(rank * count, (rank + 1) * count)


def as_megatron(
    weights: Tensor, wanted: Tensor, kept: Tensor, num_experts: int
) -> tuple[Tensor, Tensor]:
    """Convert the k choices of each token to Megatron's dense tables.

    weights: <fp32>[n, k]; wanted: <int64>[n, k], distinct within a row; kept: <bool>[n, k].
    Returns probs <fp32>[n, E] and routing_map <bool>[n, E].
    """
    probs = weights.new_zeros(len(wanted), num_experts).scatter(1, wanted, weights * kept)
    nowhere = torch.zeros_like(probs, dtype=torch.bool)
    return probs, nowhere.scatter(1, wanted, kept)
