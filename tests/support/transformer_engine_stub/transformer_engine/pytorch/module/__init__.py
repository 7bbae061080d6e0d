"""Of transformer_engine.pytorch.module: the buffers of overlapped communication."""

from . import base

__all__ = ["base"]
