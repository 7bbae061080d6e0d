"""One saved iteration of a run: its weights, its flags, and Megatron's own state."""

from __future__ import annotations

import argparse
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_smlp.checkpoints import integrity, tokenizer_copy
from megatron_smlp.checkpoints.folders import (
    RELEASE,
    TRACKER,
    checkpoint_of,
    is_ours,
    iteration_folder,
    iteration_of,
    iterations,
)
from megatron_smlp.checkpoints.model_record import flags_in
from megatron_smlp.checkpoints.reader import TorchDistReader
from megatron_smlp.errors import DamagedCheckpointError, UsageError

NOT_WEIGHTS = ("optimizer.", "rng_state", "rerun_state_machine_state", "common_state")
COMMON = "common_state/shard_0_1"


class TorchDistCheckpoint(TorchDistReader):
    """The weights of one saved iteration, whole tensors under global names.

    Args:
        folder: the --save folder of a run, or one `iter_*` or `release` folder in it.
        iteration: which one; None: the newest.

    Raises:
        UsageError: there is no checkpoint in the folder, or not one of ours.
        DamagedCheckpointError: a file other than the tensors' fails its checksum; a tensor is
            verified against a checksum of its own when it is read.
    """

    def __init__(self, folder: str | Path, *, iteration: int | None = None) -> None:
        checkpoint = _find(Path(folder), iteration)
        _check_small_files(checkpoint)
        self.flags = flags_in(checkpoint)
        super().__init__(checkpoint)
        self.specs = {
            name: spec for name, spec in self.all_specs.items() if not name.startswith(NOT_WEIGHTS)
        }

    @cached_property
    def iteration(self) -> int:
        """The iteration in its name, or in Megatron's record if it was renamed; 0: a release."""
        named = 0 if self.folder.name == RELEASE else iteration_of(self.folder)
        return int(self.common.get("iteration", 0)) if named is None else named

    @cached_property
    def common(self) -> dict[str, Any]:
        """Megatron's own state: `args`, iteration, schedule; empty if it was not saved."""
        if COMMON not in self.objects:
            return {}
        saved = self.read_object(COMMON)
        return saved[0] if isinstance(saved, list) else saved

    @cached_property
    def args(self) -> argparse.Namespace:
        """All flags of the run that saved it, as far as it recorded them.

        Tokenizer paths point to the run's copy if the original is gone.
        """
        args: argparse.Namespace = self.common.get("args") or argparse.Namespace()
        for name in tokenizer_copy.FLAGS:
            if path := getattr(args, name, None):
                setattr(args, name, tokenizer_copy.found_tokenizer(path, self.folder.parent))
        return args


class AveragedCheckpoint(TorchDistCheckpoint):
    """The last of several checkpoints of a run, with the mean of their weights (decision 88).

    Args:
        count: how many checkpoints to average.

    Raises:
        UsageError: the run has fewer up to `iteration`, or their tensors differ in form.
    """

    def __init__(self, folder: str | Path, *, iteration: int | None, count: int) -> None:
        super().__init__(folder, iteration=iteration)
        run = self.folder.parent
        kept = [number for number in iterations(run) if number <= self.iteration]
        if not 2 <= count <= len(kept):
            raise UsageError(
                f"--average {count}: {run} holds {len(kept)} checkpoints up to iteration "
                f"{self.iteration}: give 2 or more, up to that many."
            )
        self.earlier = [TorchDistCheckpoint(run, iteration=it) for it in kept[-count:-1]]
        for other in self.earlier:
            if other.specs != self.specs:
                raise UsageError(
                    f"--average {count}: {other.folder} has tensors of different sizes or types "
                    f"than {self.folder}, e.g. another vocabulary padding: average fewer."
                )

    def read_into(self, target: Tensor, name: str, *, start: int = 0) -> None:
        super().read_into(target, name, start=start)
        if not target.is_floating_point():  # the table of a hash router
            return
        total, part = target.float(), torch.empty_like(target)
        for other in self.earlier:
            other.read_into(part, name, start=start)
            total += part
        target.copy_(total / (1 + len(self.earlier)))


def _find(folder: Path, iteration: int | None) -> Path:
    if iteration is None:
        checkpoint, why = checkpoint_of(folder), f"{TRACKER} names it"
    else:
        checkpoint = iteration_folder(folder, iteration)
        why = f"--ckpt-step {iteration} asks for it"
    if not checkpoint.is_dir():
        raise UsageError(f"{checkpoint} does not exist, but {why}.")
    return checkpoint


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
