"""Of transformer_engine.pytorch.distributed: names that Megatron imports or extends."""

from __future__ import annotations

from typing import Any


class CudaRNGStatesTracker:
    """Megatron uses its own unless --te-rng-tracker selects this one."""


def activation_recompute_forward(*args: Any, **kwargs: Any) -> Any:
    """Marks a recomputed forward; nothing is computed here."""
    raise NotImplementedError("the stand-in for Transformer Engine computes nothing")
