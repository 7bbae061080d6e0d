"""Save each moment from where it is in a distributed optimizer's gathered buckets.

A distributed optimizer gathers its buckets without the padding between them, and then looks for
each parameter where it lies with the padding: moments behind the first bucket are saved shifted. A
stage with a tied embedding has two buckets, and so has every overlap of communication. Here they
are gathered with the padding, which is right in Megatron 0.19 and, where it looks past it itself,
in 0.20.
"""

from __future__ import annotations

import functools
from typing import Any

from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def apply() -> None:
    """Replace one method of DistributedOptimizer, once per process."""
    original = DistributedOptimizer.sharded_param_state_fully_reshardable
    if not hasattr(original, "__wrapped__"):
        replacement = _gathered_with_padding(original)
        DistributedOptimizer.sharded_param_state_fully_reshardable = replacement


def _gathered_with_padding(original: Any) -> Any:
    """Let each bucket call its padding its own, so that parameters lie where the buffer says."""

    @functools.wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        buckets = [bucket for buffer in self.buffers for bucket in buffer.buckets]
        unpadded = [holder.numel_unpadded for holder in (*self.buffers, *buckets)]
        for buffer in self.buffers:
            buffer.numel_unpadded = buffer.numel
        for bucket in buckets:
            bucket.numel_unpadded = bucket.grad_data.numel()
        try:
            return original(self, *args, **kwargs)
        finally:
            for holder, count in zip((*self.buffers, *buckets), unpadded, strict=True):
                holder.numel_unpadded = count

    return wrapped
