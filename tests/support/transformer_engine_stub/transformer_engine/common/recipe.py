"""FP8 recipes. Transformer Engine's are pydantic dataclasses, which ignore names that they lack."""

from __future__ import annotations

from enum import Enum
from typing import Any


class Format(Enum):
    """Of the numbers in FP8 products."""

    E4M3 = "e4m3"
    HYBRID = "hybrid"


class Recipe:
    """The arguments of the scaling, kept under their names."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings


class DelayedScaling(Recipe):
    """Scales from the history of maxima."""
