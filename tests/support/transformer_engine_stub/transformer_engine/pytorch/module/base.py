"""Buffers of overlapped communication ("userbuffers"): one per layer name, made once."""

from __future__ import annotations

from enum import Enum
from typing import Any

from ...record import record

LAYERS = ("qkv", "proj", "fc1", "fc2")
"""Names of the layers that have buffers, all of one shape: the input of a layer of the model."""

_made: list[list[int]] = []


class UserBufferQuantizationMode(Enum):
    """The quantization of a buffer."""

    NONE = "none"
    FP8 = "fp8"


def initialize_ub(shape: list[int], tp_size: int, **given: Any) -> None:
    """Make the buffers."""
    record("initialize_ub", {"shape": shape, "tp_size": tp_size, **given})
    if _made:
        raise RuntimeError("UB communicators are already initialized.")
    _made.append(shape)


def is_ub_initialized() -> bool:
    """Return whether there are buffers."""
    return bool(_made)


def destroy_ub() -> None:
    """Forget them."""
    _made.clear()


def check_buffer(name: str) -> None:
    """Check a layer's buffer when the layer is made; the real one takes it at the first step."""
    assert name in LAYERS, f"UB manager for {name} is not initialized."
