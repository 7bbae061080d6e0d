"""Decide whether Triton's kernels can run on a tensor's device, and say why they cannot."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from functools import cache

from torch import Tensor

_LOGGER = logging.getLogger(__name__)

CAPABILITY = 80
"""The minimum, times 10: Ampere's, the first with bf16 products and copies past the registers. From
there on a multiprocessor has 99 KiB of shared memory or more, which the largest kernel needs."""
FUSED = {"enable_fp_fusion": True}
"""Fuse multiplies and adds in every launch: Triton 3.10 changes the default."""


@cache
def _missing() -> str | None:
    """Return what keeps Triton from running kernels here, or None; it is the same for the whole
    process."""
    try:
        import triton
        from triton.runtime import driver
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    if triton.knobs.runtime.interpret:
        return None
    try:
        target = driver.active.get_current_target()
    except Exception as error:  # an assertion, an OSError, a RuntimeError: each driver has its own
        return f"Triton cannot use a GPU driver ({str(error).partition('\n')[0]})"
    if target.backend != "cuda" or target.arch < CAPABILITY:
        return f"they need an NVIDIA GPU of capability 8.0 or more, not {target.arch}"
    return None


def use_kernels(operation: str, tensor: Tensor, *, unsupported: str = "") -> bool:
    """Return whether `operation` runs as Triton kernels; on a GPU, log once why not.

    tensor: one of the operands. On a CPU kernels never run, and nothing is logged.
    unsupported: why the kernels cannot take this call, or empty.
    """
    if tensor.device.type != "cuda":
        return False
    reason = unsupported or _missing()
    if reason:
        _say_once(operation, reason)
    return not reason


@cache
def _say_once(operation: str, reason: str) -> None:
    _LOGGER.warning("%s runs without Triton kernels, and slower: %s.", operation, reason)


def rows_ready(tensor: Tensor) -> Tensor:
    """Return the tensor itself if its features are contiguous, else a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def strided(tensor: Tensor) -> tuple[Tensor, int, int]:
    """Return a kernel's arguments for [T, B, K]: the tensor, strides of tokens and of samples."""
    return tensor, tensor.stride(0), tensor.stride(1)


@contextlib.contextmanager
def unsaid() -> Iterator[None]:
    """Suppress warnings of what runs without kernels here; they appear when it next runs so."""
    _LOGGER.disabled = True
    try:
        yield
    finally:
        _LOGGER.disabled = False
        _say_once.cache_clear()
