"""Values that a model's call hands its routers, which Megatron's layers do not pass on.

A pipeline stage has several micro-batches under way, and their backward passes come in the order of
their forward passes: a layer that is recomputed finds what its own forward pass had.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor


def repeats_a_pass() -> bool:
    """Return whether the forward pass under way was made before, and only recomputes activations.

    It then runs inside of a backward pass, whoever recomputes: Megatron's own checkpoint function
    has a flag for it, but with FP8 Megatron takes Transformer Engine's, which does not set it.
    """
    return torch._C._current_graph_task_id() != -1


class Handed:
    """A tensor of the micro-batch whose pass it is."""

    def __init__(self) -> None:
        self._now: Tensor | None = None
        self._trains = False
        self._to_recompute: deque[Tensor | None] = deque()

    def hand(self, value: Tensor | None) -> None:
        """Before a forward pass; None: there is nothing."""
        self._now, self._trains = value, torch.is_grad_enabled()

    def take(self) -> Tensor | None:
        """Return what was handed for this pass, once in every pass.

        A pass that will be repeated is known by having no gradients in a call that has them.
        """
        if repeats_a_pass() and self._to_recompute:
            return self._to_recompute.popleft()
        # Evaluations, for which nothing may be handed, are no second pass of the last training's.
        trains, self._trains = self._trains, False
        if trains and not torch.is_grad_enabled():
            self._to_recompute.append(self._now)
        return self._now
