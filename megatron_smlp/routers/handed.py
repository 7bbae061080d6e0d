"""What the call of a model hands its routers, which Megatron's layers do not pass on.

A pipeline stage has several micro-batches under way, and their backward passes come in the order of
their forward passes: a layer that is recomputed finds what its own forward pass had.
"""

from __future__ import annotations

from collections import deque

from megatron.core.tensor_parallel.random import is_checkpointing
from torch import Tensor


class Handed:
    """A tensor of the micro-batch whose pass it is."""

    def __init__(self) -> None:
        self.now: Tensor | None = None
        """Of the forward pass under way; None: nothing was handed."""
        self._to_recompute: deque[Tensor | None] = deque()

    def take(self, *, repeats: bool) -> Tensor | None:
        """Return it, once in every pass; `repeats`: statistics.repeats_a_pass() in this one."""
        if repeats:
            return self._to_recompute.popleft()
        if is_checkpointing():
            self._to_recompute.append(self.now)
        return self.now
