"""`model.json` in a checkpoint: the flags that make the model in it.

It lies in each `iter_*` folder, beside Megatron's own files, as plain JSON, so that the flags can
be read without torch and without unpickling anything.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_smlp.checkpoints.folders import (
    MODEL,
    iteration_folder,
    tracked_folder,
)
from megatron_smlp.command_line import flag_of
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


def read_model_flags(checkpoint: str | Path, iteration: int | None = None) -> dict[str, Any] | None:
    """Return the flags of a checkpoint in a run's folder; None if it was not written by us.

    A damaged file is not an error here: whoever loads the checkpoint compares its checksums before.

    Args:
        iteration: the one to read; left out: the newest.
    """
    if iteration is None:
        folder = tracked_folder(checkpoint)
    else:
        folder = iteration_folder(checkpoint, iteration)
    try:
        return flags_in(folder) if folder else None
    except UserError:
        return None


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


def check_against_checkpoint(args: argparse.Namespace) -> None:
    """Refuse flags that contradict the checkpoint that is to be loaded.

    Raises:
        UsageError: with the flag and both values.
    """
    if args.load:
        check_same_model(model_flags(args), args.load, args.ckpt_step)


def check_same_model(wanted: Mapping[str, Any], load: str, iteration: int | None) -> None:
    """Compare a model's flags with those of a checkpoint in a run's folder.

    Args:
        iteration: the checkpoint's; None: the newest.

    Raises:
        UsageError: with the flag and both values.
    """
    for name, there in (read_model_flags(load, iteration) or {}).items():
        here = wanted.get(name, there)
        may_change = name in MODEL_FLAGS and MODEL_FLAGS[name].may_change
        if here != there and not may_change:
            flag = flag_of(name)
            raise UsageError(
                f"{flag} {here} contradicts the checkpoint {load}, which was made with {there}: "
                f"give {flag} {there}, or another folder."
            )
