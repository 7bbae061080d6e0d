"""FP8 contexts, recorded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ..record import record


class FP8GlobalStateManager:
    """FP8 is never on: nothing is computed here."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        return False


@contextlib.contextmanager
def fp8_autocast(
    enabled: bool = True,
    calibrating: bool = False,
    fp8_recipe: Any = None,
    fp8_group: Any = None,
    _graph: bool = False,
) -> Iterator[None]:
    """Record that products inside are in FP8."""
    record("fp8_autocast", {"enabled": enabled, "fp8_recipe": fp8_recipe, "fp8_group": fp8_group})
    yield


@contextlib.contextmanager
def fp8_model_init(
    enabled: bool = True, recipe: Any = None, preserve_high_precision_init_val: bool = False
) -> Iterator[None]:
    """Record that parameters made inside are in FP8."""
    record("fp8_model_init", {"enabled": enabled, "recipe": recipe})
    yield
