"""FP8 recipes. Transformer Engine's are pydantic dataclasses, which ignore unknown names."""

from __future__ import annotations

from enum import Enum
from typing import Any


class Format(Enum):
    """Number formats of FP8 products."""

    E4M3 = "e4m3"
    HYBRID = "hybrid"


class Recipe:
    """The scaling's arguments, kept by name."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings


class DelayedScaling(Recipe):
    """Scales from the history of maxima."""
