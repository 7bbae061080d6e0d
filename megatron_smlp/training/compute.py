"""The FLOPs that a training has spent, counted by the choices that its routers did send.

    spent = tokens x (3 forward of the configuration) - 3 forward of every choice that was not sent

What is not sent: second experts that GShard does not draw, and choices over a capacity.
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
    """See the top of the file; `square` and needed FLOPs as in accounting/costs.py."""

    def __init__(self, shape: ModelShape) -> None:
        self.square, self.needed = training_flops_per_token(model_cost(shape), shape)
        self.choices_per_token = choices_per_token(shape)
        self.per_choice = 3 * choice_flops(shape)
        self.tokens = 0
        self.unsent = 0.0
        """FLOPs a token that were not spent, mean over the first `tokens` of the run; a checkpoint
        carries it."""

    def resume(self, unsent: float, *, tokens: int) -> None:
        """Go on at `tokens` of a run, of whose FLOPs a token `unsent` were not spent."""
        self.unsent, self.tokens = unsent, tokens

    def add(self, loads: Mapping[RouterKey, RouterLoad], *, tokens: int) -> float:
        """Take in what the routers did up to `tokens` of the run.

        Returns:
            needed FLOPs of one token since the last call.
        """
        new = tokens - self.tokens
        token_loads = [load for key, load in loads.items() if key.kind == "token"]
        if new <= 0 or not token_loads:
            return self.needed - self.unsent
        sent = sum(load.choices * (1 - load.drop_rate) for load in token_loads)
        unsent = (self.choices_per_token - sent / new) * self.per_choice
        self.unsent += (unsent - self.unsent) * new / tokens
        self.tokens = tokens
        return self.needed - unsent

    def spent(self, tokens: int) -> dict[str, float]:
        """FLOPs of the run up to `tokens`, for metrics.jsonl."""
        return {
            "consumed_flops": tokens * (self.needed - self.unsent),
            "consumed_square_flops": tokens * (self.square - self.unsent),
        }
