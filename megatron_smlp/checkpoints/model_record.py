"""`model.json` in a checkpoint: the flags that make the model in it.

It lies in each `iter_*` folder, beside Megatron's own files, as plain JSON, so that the flags can
be read without torch and without unpickling anything.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from megatron_smlp.checkpoints.folders import MODEL, folder_at
from megatron_smlp.errors import DamagedCheckpointError, UsageError, UserError
from megatron_smlp.options import DEFAULTS, MODEL_FLAGS, older_flags


def model_flags(args: argparse.Namespace) -> dict[str, Any]:
    """Return the flags that make the model what it is, by argparse destination."""
    from megatron.training import get_tokenizer

    flags = {name: getattr(args, name) for name in MODEL_FLAGS}
    flags["vocab_size"] = get_tokenizer().vocab_size
    if flags["window_size"] is not None:
        flags["window_size"] = str(flags["window_size"])  # JSON has no tuples
    if not args.group_query_attention:
        flags["num_query_groups"] = None  # without it Megatron fills in one number or another
    return flags


def read_model_flags(checkpoint: str | Path, iteration: int | None = None) -> dict[str, Any]:
    """Return the flags of a checkpoint in a run's folder; none if it was not written by us.

    A damaged file is not an error here: whoever loads the checkpoint compares its checksums before.

    Args:
        iteration: the one to read; left out: the newest.
    """
    folder = folder_at(checkpoint, iteration)
    try:
        return flags_in(folder) if folder else {}
    except UserError:
        return {}


def flags_in(folder: Path) -> dict[str, Any]:
    """Return the flags in the folder of one checkpoint, with those that are newer than it.

    Raises:
        UsageError: it was not written by us.
        DamagedCheckpointError: model.json is not what was written.
    """
    path = folder / MODEL
    try:
        flags: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(
            f"{folder} has no {MODEL}, which pretrain_smlp.py writes beside each checkpoint."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedCheckpointError(f"{path} is not JSON ({error}).") from error
    if not isinstance(flags, dict):
        raise DamagedCheckpointError(f"{path} does not hold a JSON object.")
    older = dict(older_flags(flags.get("token_router", "none")))
    defaults = {name: DEFAULTS[name] for name in MODEL_FLAGS if name in DEFAULTS}
    return {**defaults, **older, **flags}
