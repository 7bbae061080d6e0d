"""Of transformer_engine.common: the recipes."""

from . import recipe

__all__ = ["recipe"]
