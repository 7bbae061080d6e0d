"""Reports, once a run is under way again, what a failure cost: cause, lost steps, seconds."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from megatron_smlp.checkpoints.save_lease import PreviousRun
from megatron_smlp.collectives import gathered
from megatron_smlp.restart_note import noted_cause
from megatron_smlp.training.speed import duration

BY_HAND = "ended without a word, and started again by hand"


@dataclass(frozen=True)
class Restart:
    """What a restart cost; only the first rank has one."""

    cause: str
    iteration: int
    """Iteration of the checkpoint that the run resumes from."""
    lost: int
    """Steps that had been trained past that checkpoint."""
    ended: float
    """Time of the last run's last heartbeat, by time.monotonic."""

    def seconds_down(self) -> float:
        """Return the seconds without a run up to now; call it when the first step is done."""
        return time.monotonic() - self.ended

    def record(self) -> dict[str, Any]:
        """Return the record for metrics.jsonl."""
        cost = {"lost_steps": self.lost, "seconds_down": self.seconds_down()}
        return {"iteration": self.iteration, "restart": {"cause": self.cause, **cost}}

    def __str__(self) -> str:
        steps = f"{self.lost} {'step' if self.lost == 1 else 'steps'}"
        return (
            f"restarted from iteration {self.iteration}: {self.cause} | {steps} lost | "
            f"{duration(self.seconds_down())} down"
        )


def restart(before: PreviousRun | None, *, iteration: int, logged: int) -> Restart | None:
    """Determine what a restart cost; None if the last run ended well.

    Collective.

    Args:
        before: what the last run left in its lease; on rank 0 only.
        iteration: where this run begins.
        logged: the last iteration in metrics.jsonl.
    """
    causes = [cause for cause in gathered(noted_cause()) if cause is not None]
    if before is None or not (before.failed or causes):
        return None
    # The failure noticed first: by age, since the machines' clocks may differ.
    cause, _ = max(causes, key=lambda cause: cause[1], default=(BY_HAND, 0.0))
    return Restart(
        cause=cause,
        iteration=iteration,
        lost=max(0, max(before.iteration, logged) - iteration),
        ended=time.monotonic() - before.seconds,
    )
