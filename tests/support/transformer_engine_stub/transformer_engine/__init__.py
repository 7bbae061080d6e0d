"""Stands in for Transformer Engine where there is none: it builds, records, and computes nothing.

Put its folder on PYTHONPATH of a process of its own: Megatron looks for the package when it is
imported. Every constructor takes the arguments that Transformer Engine's takes (signatures.py) and
refuses what it refuses; `record.CALLS` holds them in order.
"""

from . import common, pytorch

__version__ = "2.18.0"

__all__ = ["common", "pytorch"]
