"""Do once in a process of many short runs what Megatron does anew at every start."""

from __future__ import annotations

import gc
import os
from typing import Any

NUM_DOCUMENTS = 1000


def quicken() -> None:
    """Remember the docstrings that Megatron's flags have from its sources; mock less data; leave
    it to the system when a file reaches the disk; let collections of garbage look at what runs
    make, not at what was imported for them.

    The first two are half of a run of five steps. Megatron is imported here.
    """
    from megatron.core.datasets.gpt_dataset import MockGPTLowLevelDataset
    from megatron.training.argument_utils import ArgumentGroupFactory

    os.fsync = lambda _: None
    MockGPTLowLevelDataset.size = NUM_DOCUMENTS  # 100,000 are shuffled for each split of each run
    if not hasattr(ArgumentGroupFactory, "_read_docstrings"):
        ArgumentGroupFactory._read_docstrings = ArgumentGroupFactory._get_field_docstrings
        ArgumentGroupFactory._get_field_docstrings = _remembered
        gc.collect()
        gc.freeze()


_docstrings: dict[type, dict[str, str]] = {}


def _remembered(factory: Any, config: type) -> dict[str, str]:
    if config not in _docstrings:
        _docstrings[config] = factory._read_docstrings(config)
    return dict(_docstrings[config])
