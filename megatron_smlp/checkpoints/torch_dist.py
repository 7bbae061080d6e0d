"""One saved iteration of a run: its weights, its flags, and Megatron's own state."""

from __future__ import annotations

import argparse
import json
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_smlp.checkpoints import integrity
from megatron_smlp.checkpoints.folders import (
    MODEL,
    TRACKER,
    checkpoint_of,
    is_ours,
    iteration_folder,
    iteration_of,
)
from megatron_smlp.checkpoints.model_record import with_older_flags
from megatron_smlp.checkpoints.reader import TorchDistReader
from megatron_smlp.checkpoints.tensors import check_scale
from megatron_smlp.errors import DamagedCheckpointError, UsageError

NOT_WEIGHTS = ("optimizer.", "rng_state", "rerun_state_machine_state", "common_state")
COMMON = "common_state/shard_0_1"


class TorchDistCheckpoint(TorchDistReader):
    """The weights of one saved iteration, whole tensors under global names.

    Args:
        folder: the --save folder of a run, or one `iter_*` or `release` folder in it.
        iteration: which one, where the newest is not wanted.

    Raises:
        UsageError: there is no checkpoint in the folder, or not one of ours.
        DamagedCheckpointError: a file beside the tensors is not what was written; a tensor is
            compared with a checksum of its own when it is read.
    """

    def __init__(self, folder: str | Path, *, iteration: int | None = None) -> None:
        found = _find(Path(folder), iteration)
        _check_small_files(found)
        self.flags = _read_flags(found)
        super().__init__(found)
        self.iteration = iteration_of(found) or 0
        self.specs = {
            name: spec for name, spec in self.all_specs.items() if not name.startswith(NOT_WEIGHTS)
        }
        check_scale(self.specs, self.flags, where=str(found))

    @cached_property
    def common(self) -> dict[str, Any]:
        """Megatron's own state: `args`, iteration, schedule; empty where it was not saved."""
        if COMMON not in self.objects:
            return {}
        saved = self.read_object(COMMON)
        state: dict[str, Any] = saved[0] if isinstance(saved, list) else saved
        return state

    @property
    def args(self) -> argparse.Namespace:
        """All flags of the run that saved it, as far as it recorded them."""
        args: argparse.Namespace = self.common.get("args") or argparse.Namespace()
        return args


def _find(folder: Path, iteration: int | None) -> Path:
    if iteration is None or (folder / ".metadata").is_file():
        found, why = checkpoint_of(folder), f"{TRACKER} names it"
    else:
        found, why = iteration_folder(folder, iteration), f"--ckpt-step {iteration} asks for it"
    if not found.is_dir():
        raise UsageError(f"{found} does not exist, but {why}.")
    return found


def _check_small_files(folder: Path) -> None:
    if not is_ours(folder):
        return
    sums, problems = integrity.read_sums(folder)
    small = {name: digest for name, digest in sums.items() if not name.endswith(".distcp")}
    problems = problems or integrity.problems_in(folder, small)
    if problems:
        raise DamagedCheckpointError(
            f"{folder} is damaged ({'; '.join(problems)}): restore it, or take another iteration."
        )


def _read_flags(folder: Path) -> dict[str, Any]:
    path = folder / MODEL
    if not path.exists():
        raise UsageError(
            f"{folder} has no {MODEL}, which pretrain_smlp.py writes beside each checkpoint."
        )
    try:
        flags: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpointError(f"{path} is not JSON ({error}).") from error
    if not isinstance(flags, dict):
        raise DamagedCheckpointError(f"{path} holds no JSON object.")
    return with_older_flags(flags)
