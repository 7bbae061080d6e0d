"""Stands in for Transformer Engine where there is none: it builds, records, and computes nothing.

Put its folder on the PYTHONPATH of a separate process: Megatron looks for the package on import.
Every constructor takes the arguments that Transformer Engine's takes (signatures.py) and rejects
what it rejects; `record.CALLS` holds the calls in order.
"""

from . import common, pytorch

__version__ = "2.18.0"

__all__ = ["common", "pytorch"]
