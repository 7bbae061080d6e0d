"""The FLOPs that a training has spent, counted by the choices that its routers actually sent.

    spent = tokens x (3 forward of the configuration) - 3 forward of every choice that was not sent

Not sent are second experts that GShard does not draw, and choices over an expert's capacity.
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_smlp.accounting.costs import (
    ModelShape,
    choice_flops,
    choices_per_token,
    model_cost,
    training_flops_per_token,
)
from megatron_smlp.routers.statistics import RouterKey, RouterLoad


class Compute:
    """See the module docstring; `square` and needed FLOPs as in accounting/costs.py."""

    def __init__(self, shape: ModelShape) -> None:
        self.square, self.needed = training_flops_per_token(model_cost(shape), shape)
        self.choices_per_token = choices_per_token(shape)
        self.per_choice = 3 * choice_flops(shape)
        self.tokens = 0
        self.unsent = 0.0
        """FLOPs per token that were not spent, mean over the first `tokens` tokens of the run;
        saved with a checkpoint."""

    def resume(self, unsent: float, *, tokens: int) -> None:
        """Resume a run after `tokens` tokens; `unsent` is its mean of FLOPs per token not spent."""
        self.unsent, self.tokens = unsent, tokens

    def add(self, loads: Mapping[RouterKey, RouterLoad], *, tokens: int) -> float:
        """Account for the router loads since the last call, up to `tokens` tokens of the run.

        Returns:
            needed FLOPs per token since the last call.
        """
        new = tokens - self.tokens
        token_loads = [load for key, load in loads.items() if key.kind == "token"]
        if new <= 0 or not self.choices_per_token:
            return self.needed - self.unsent
        sent = sum(load.choices * (1 - load.drop_rate) for load in token_loads)
        unsent = (self.choices_per_token - sent / new) * self.per_choice
        self.unsent += (unsent - self.unsent) * new / tokens
        self.tokens = tokens
        return self.needed - unsent

    def spent(self, tokens: int) -> dict[str, float]:
        """Return the FLOPs of the run's first `tokens` tokens, for metrics.jsonl."""
        return {
            "consumed_flops": tokens * (self.needed - self.unsent),
            "consumed_square_flops": tokens * (self.square - self.unsent),
        }
