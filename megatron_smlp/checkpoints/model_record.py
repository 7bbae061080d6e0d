"""`model.json` in a checkpoint: the flags that define its model.

It is in each `iter_*` folder, next to Megatron's own files, as plain JSON, so that the flags can be
read without torch and without unpickling anything.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_smlp import plugin_texts
from megatron_smlp.checkpoints.folders import MODEL, folder_at
from megatron_smlp.checkpoints.integrity import read_record
from megatron_smlp.errors import UsageError
from megatron_smlp.options import MODEL_FLAGS, model_defaults


def model_flags(args: argparse.Namespace) -> dict[str, Any]:
    """Return the flags that define the model, by argparse destination."""
    from megatron.training import get_tokenizer

    flags = {name: getattr(args, name) for name in MODEL_FLAGS}
    flags["vocab_size"] = get_tokenizer().vocab_size
    if plugins := plugin_texts.recorded():
        flags["plugins"] = plugins
    if flags["window_size"] is not None:
        flags["window_size"] = str(flags["window_size"])  # JSON has no tuples
    if not args.group_query_attention:
        flags["num_query_groups"] = None  # unused, and Megatron fills in different numbers
    return flags


def read_model_flags(checkpoint: str | Path, iteration: int | None = None) -> dict[str, Any]:
    """Return the model flags of a checkpoint in a run's folder; none if we did not write it.

    A damaged file yields no flags, and no error: loading the checkpoint reports it.

    Args:
        iteration: the one to read; None: the newest.

    Raises:
        UsageError: it was written with a plugin that was not given, or that has another text.
    """
    folder = folder_at(checkpoint, iteration)
    return (_completed(folder) if folder else None) or {}


def flags_in(folder: Path) -> dict[str, Any]:
    """Return the model flags in the folder of one checkpoint.

    Raises:
        UsageError: it was not written by us, or with a plugin that was not given.
    """
    flags = _completed(folder)
    if flags is None:
        raise UsageError(
            f"{folder} has no {MODEL}, which pretrain_smlp.py writes with each checkpoint."
        )
    return flags


def _completed(folder: Path) -> dict[str, Any] | None:
    """Add the defaults that model.json leaves out, once its plugins are known to be named."""
    flags = read_record(folder, MODEL)
    if flags is None:
        return None
    plugin_texts.require(flags.get("plugins", {}), str(folder))
    return {**model_defaults(), **flags}
