"""Decide whether to restart a failed run, by its newest checkpoint. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_smlp.checkpoints.folders import latest_iteration
from megatron_smlp.launching.training_argv import FROM_CHECKPOINT, given, is_on


class Failures:
    """Counts a run's failures since its newest checkpoint; after too many a launcher gives up."""

    LIMIT = 3
    """After this many in a row without a newer checkpoint, a restart would only fail again."""

    def __init__(self, argv: Sequence[str]) -> None:
        # As flags/use_checkpoint_args.py chooses --save.
        goes_on = is_on(FROM_CHECKPOINT, argv) and not is_on("--finetune", argv)
        is_load = goes_on and "--no-save" not in argv
        save = given("--save", argv) or (given("--load", argv) if is_load else None)
        self.folder = Path(str(save)) if save else None
        """Where a training with these flags saves."""
        self.count = 0
        self.newest = self.latest()

    def latest(self) -> int | None:
        """Return the iteration of the newest checkpoint."""
        return latest_iteration(self.folder) if self.folder else None

    def add(self, *, within: int = 0) -> None:
        """Count one more failure.

        Args:
            within: how many the failed process has counted itself, since its newest checkpoint.
        """
        newest = self.latest()
        is_newer = newest is not None and newest > (-1 if self.newest is None else self.newest)
        self.count = within if is_newer else self.count + max(1, within)
        self.newest = newest

    def __str__(self) -> str:
        if self.folder is None:
            return "without --save there is nothing to resume"
        newest = "none" if self.newest is None else f"of iteration {self.newest}"
        return f"the newest checkpoint in {self.folder} is {newest}"
