"""Fixes the offsets at which a distributed optimizer saves the moments of its gathered buckets.

The distributed optimizer gathers its buckets without the padding between them, but then looks up
each parameter at its offset with padding: moments after the first bucket are saved shifted. A stage
with a tied embedding has two buckets, as does any overlap of communication. This patch gathers the
buckets with their padding, which is correct in Megatron 0.19 and also in 0.20, where Megatron skips
the padding itself.
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
    """Count each bucket's padding as content, so that the buffer's offsets hold."""

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
