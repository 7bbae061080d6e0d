"""A study's worker, which takes one run after another until nothing is left for it to do.

plan.py decides their order; state.py says which of them are free.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_smlp.checkpoints.folders import latest_iteration
from megatron_smlp.errors import NonFiniteLossError
from megatron_smlp.lease import Lease, holder_of
from megatron_smlp.progress import Progress
from megatron_smlp.study.data import StudyData
from megatron_smlp.study.made_by import note
from megatron_smlp.study.metrics import SUFFIX_LOSS, VALIDATION_LOSS, last_step, validation_at
from megatron_smlp.study.plan import Plan, PlannedRun
from megatron_smlp.study.process import (
    last_lines,
    made_by_next,
    run_command,
    training_command,
)
from megatron_smlp.study.state import CHECKPOINTS, DIVERGED, DONE, FAILED, State

ATTEMPTS = 2
WAIT_SECONDS = 2.0
IDLE_SCANS = 2
"""Consecutive scans that must find no work: a run that ends after the first may unlock others."""


@dataclass(kw_only=True)
class Worker:
    """One of any number of workers of a study, on any number of machines."""

    state: State
    data: StudyData
    processes: int = 1
    """Processes of one run."""

    def work(self, *, waits: bool = True) -> None:
        """Work until every run is over or blocked by a failed one; unless `waits`, also stop when
        only runs remain that other workers hold or must finish first."""
        first = self.state.plan()
        total = _iterations((*first.runs, *first.pending))
        with Progress(total) as progress:
            idle = 0
            while idle < IDLE_SCANS:
                plan = self.state.plan()
                to_do = self.state.to_do(plan)
                if self._run_one(to_do, plan, progress):
                    idle = 0
                elif waits and any(self.state.is_held(run) for run in to_do):
                    idle = 0
                    over, counts = self._counts(plan)
                    progress.show(over, f"{counts}; waiting for the other workers")
                    time.sleep(WAIT_SECONDS)
                else:
                    idle += 1

    def _run_one(self, to_do: list[PlannedRun], plan: Plan, progress: Progress) -> bool:
        """Run the first free run whose parent is ready. Return whether anything changed."""
        for run in to_do:
            if run.parent is not None and self.state.is_lost(run.parent):
                if self._end_if_parent_diverged(run, run.parent):
                    return True
            elif run.parent is None or self.state.has_checkpoint(run.parent):
                lease = self.state.take(self.state.folder_of(run))
                if lease is not None:
                    with lease:
                        # Another worker may have ended it since the plan was made. Checkpoints do
                        # not show that: those that no run continues are removed at its end.
                        still_to_do = self.state.to_do(self.state.plan())
                        if any(run.key == other.key for other in still_to_do):
                            self._make(run, lease, plan, progress)
                    return True
        return False

    def _end_if_parent_diverged(self, run: PlannedRun, parent: PlannedRun) -> bool:
        """Mark a run diverged if its parent diverged; return False if the parent failed."""
        if self.state.status(parent) != DIVERGED:
            return False
        folder = self.state.folder_of(run)
        folder.mkdir(parents=True, exist_ok=True)
        note(folder, self.state.made_by(parent))
        self.state.end(run, status=DIVERGED, loss="inf", reason=f"{parent.title} diverged")
        return True

    def _make(self, run: PlannedRun, lease: Lease, plan: Plan, progress: Progress) -> None:
        folder = self.state.folder_of(run)
        over, counts = self._counts(plan)

        def watch() -> None:
            done, where = _reached(run, folder)
            progress.show(over + done, f"{counts}; {where}")

        # A killed worker may have left a complete run. If it were trained again, it would go on
        # past its end, to the next multiple of --exit-interval.
        attempts = failures = code = 0
        while failures < ATTEMPTS and not self._is_whole(run):
            if holder := holder_of(folder / CHECKPOINTS):  # a training that saves as it ends
                progress.show(over, f"{counts}; {run.title}: waiting for {holder} to save")
                if lease.lost.wait(WAIT_SECONDS):
                    return
                continue
            before = latest_iteration(folder / CHECKPOINTS)
            command = training_command(
                folder, run.flags, paths=self._path_flags(run), processes=self.processes
            )
            note(folder, made_by_next(self.processes))
            code = run_command(command, folder=folder, stop=lease.lost, watch=watch)
            if not lease.is_held():  # another worker has taken over
                return
            attempts += 1
            if code == NonFiniteLossError.exit_code:
                break
            # A run asked to stop exits with 0 before its end; the loop starts it again.
            failures += code != 0 or latest_iteration(folder / CHECKPOINTS) == before
        self._end(run, code=code, attempts=attempts)

    def _path_flags(self, run: PlannedRun) -> list[str]:
        folder = self.state.folder_of(run)
        own = folder / CHECKPOINTS
        flags = [*self.data.flags, "--save", str(own), "--log-dir", str(folder), "--keep-last", "1"]
        if run.parent is not None and latest_iteration(own) is None:
            flags += ["--load", str(self.state.folder_of(run.parent) / CHECKPOINTS)]
        return flags

    def _end(self, run: PlannedRun, *, code: int, attempts: int) -> None:
        folder = self.state.folder_of(run)
        facts = {"code": code, "attempts": attempts}
        final = validation_at(folder, run.end)
        if code == NonFiniteLossError.exit_code:
            self.state.end(
                run, status=DIVERGED, loss="inf", reason="a loss was not finite", **facts
            )
            self._remove_checkpoints(run)
        elif not self._is_whole(run):
            lines = last_lines(folder)
            self.state.end(run, status=FAILED, last_lines=lines, **facts)
            report = "\n".join(f"  {line}" for line in lines)
            print(f"failed ({code}): {run.title}, {folder}:\n{report}", file=sys.stderr, flush=True)
        else:
            suffix = self.state.systems[run.system].predicts_suffix
            name = SUFFIX_LOSS if suffix else VALIDATION_LOSS
            loss = final[name] if final and run.horizon else None
            self.state.end(run, status=DONE, loss=loss, **facts)
            self._remove_checkpoints(run)

    def _is_whole(self, run: PlannedRun) -> bool:
        """Return whether a run reached its end and, unless part of a trunk, was evaluated there."""
        folder = self.state.folder_of(run)
        reached = latest_iteration(folder / CHECKPOINTS) or 0
        is_evaluated = run.horizon is None or validation_at(folder, run.end) is not None
        return reached >= run.end and is_evaluated

    def _remove_checkpoints(self, run: PlannedRun) -> None:
        """Remove checkpoints except at the longest horizon and of trunks that runs still need;
        nothing needs those of a run that diverged."""
        is_short = run.horizon and (run.phase == "tuning" or run.horizon < self.state.study.longest)
        if is_short or self.state.status(run) == DIVERGED:
            shutil.rmtree(self.state.folder_of(run) / CHECKPOINTS, ignore_errors=True)
        if run.parent is None:
            return
        plan = self.state.plan()
        children = [
            child for child in plan.runs if child.parent and child.parent.key == run.parent.key
        ]
        # Not if the plan has changed meanwhile and no longer has this run.
        is_known = run.key in {child.key for child in children}
        if is_known and all(self.state.status(child) in (DONE, DIVERGED) for child in children):
            shutil.rmtree(self.state.folder_of(run.parent) / CHECKPOINTS, ignore_errors=True)

    def _counts(self, plan: Plan) -> tuple[int, str]:
        """Return the iterations of runs that are over, and a summary of the runs in each state."""
        statuses = [self.state.status(run) for run in plan.runs]
        pairs = zip(plan.runs, statuses, strict=True)
        over = _iterations(run for run, status in pairs if status in (DONE, DIVERGED, FAILED))
        text = f"{statuses.count(DONE)} of {len(plan.runs) + len(plan.pending)} runs done"
        for name in (DIVERGED, FAILED):
            text += f", {statuses.count(name)} {name}" if statuses.count(name) else ""
        return over, text


def _iterations(runs: Iterable[PlannedRun]) -> int:
    return sum(run.end - run.start for run in runs)


def _reached(run: PlannedRun, folder: Path) -> tuple[int, str]:
    """Return how many iterations a run has made since its start, and describe where it is."""
    iteration, loss = last_step(folder)
    where = f"iteration {iteration} of {run.end}, loss {loss:.3f}" if iteration else "starting"
    return max(0, iteration - run.start), f"{run.title}: {where}"
