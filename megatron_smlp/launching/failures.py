"""Decide whether a run that fails is started again: its newest checkpoint tells. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_smlp.checkpoints.folders import latest_iteration
from megatron_smlp.launching.training_words import given, is_on


def saving_folder(words: Sequence[str]) -> Path | None:
    """Return where a training with these flags saves, as flags/use_checkpoint_args.py chooses."""
    save = given("--save", words)
    goes_on = is_on("--use-checkpoint-args", words) and not is_on("--finetune", words)
    if save is None and goes_on and "--no-save" not in words:
        save = given("--load", words)
    return Path(str(save)) if save else None


class Failures:
    """Failures of a run since its newest checkpoint: with too many of them a launcher gives up."""

    LIMIT = 3
    """So many in a row without a newer checkpoint, and another start would only fail again."""

    def __init__(self, words: Sequence[str]) -> None:
        self.folder = saving_folder(words)
        self.count = 0
        self.newest = self.latest()

    def latest(self) -> int | None:
        """Return the iteration of the newest checkpoint."""
        return latest_iteration(self.folder) if self.folder else None

    def add(self, *, within: int = 0) -> None:
        """Count one more failure.

        Args:
            within: those that what failed has counted itself, since its newest checkpoint.
        """
        newest = self.latest()
        is_newer = newest is not None and newest > (-1 if self.newest is None else self.newest)
        self.count = within if is_newer else self.count + max(1, within)
        self.newest = newest

    def is_stuck(self) -> bool:
        """Return whether another start would only fail again: too many failures, or nothing to
        resume from."""
        return self.folder is None or self.count >= self.LIMIT

    def __str__(self) -> str:
        if self.folder is None:
            return "without --save there is nothing to go on from"
        newest = "none" if self.newest is None else f"of iteration {self.newest}"
        return f"the newest checkpoint in {self.folder} is {newest}"
