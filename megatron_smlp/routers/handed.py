"""Values that a model's call hands to its routers, since Megatron's layers do not pass them on.

A pipeline stage has several micro-batches in flight, and their backward passes come in the order of
their forward passes: a layer that is recomputed gets the value of its own forward pass.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor


def repeats_a_pass() -> bool:
    """Return whether the current forward pass only recomputes the activations of an earlier one.

    It then runs inside a backward pass, whoever recomputes. Megatron's own checkpoint function has
    a flag for it, but with FP8 Megatron uses Transformer Engine's, which does not set it.
    """
    return torch._C._current_graph_task_id() != -1


class Handed:
    """A tensor of the micro-batch in the current pass."""

    def __init__(self) -> None:
        self._now: Tensor | None = None
        self._trains = False
        self._to_recompute: deque[Tensor | None] = deque()

    def hand(self, value: Tensor | None) -> None:
        """Set the value for the next forward pass; None: there is none."""
        self._now, self._trains = value, torch.is_grad_enabled()

    def take(self) -> Tensor | None:
        """Return what was handed for this pass; call it once per pass.

        A pass that will be repeated is recognized by having no gradients in a call that has them.
        """
        if repeats_a_pass() and self._to_recompute:
            return self._to_recompute.popleft()
        # An evaluation, which may be handed nothing, is no second pass of the last training call.
        trains, self._trains = self._trains, False
        if trains and not torch.is_grad_enabled():
            self._to_recompute.append(self._now)
        return self._now
