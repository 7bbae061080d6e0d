"""Tools say what they have to say; what libraries say while they are imported is not that."""

from __future__ import annotations

import logging
import warnings


def silence_libraries() -> None:
    """What they say of a machine without CUDA, Apex or Transformer Engine is no news here."""
    warnings.simplefilter("ignore")
    for name in ("torch.utils.cpp_extension", "megatron"):
        logging.getLogger(name).setLevel(logging.ERROR)
