"""Silences libraries that log too much for a tool whose output people read."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator

LIBRARIES = (
    "accelerate",
    "datasets",
    "huggingface_hub",
    "lm_eval",
    "megatron",
    "torch.utils.cpp_extension",
    "transformers",
)


def silence_libraries() -> None:
    """Silence the libraries: missing CUDA, Apex or Transformer Engine is no news here."""
    warnings.simplefilter("ignore")
    for name in LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence the libraries inside the block, and their progress bars for good."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if "datasets" in sys.modules:
        sys.modules["datasets"].disable_progress_bars()
    before = {name: logging.getLogger(name).level for name in LIBRARIES}
    try:
        with warnings.catch_warnings():
            silence_libraries()
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
