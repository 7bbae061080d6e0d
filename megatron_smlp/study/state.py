"""The state of a study: the folders of its runs, what is there, and what is left to do.

runs/study/<name>/study.json records the study file and data that the runs began with. A run's own
folder has flags.yaml, metrics.jsonl, output.log, checkpoints/, and ended.json once it is over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_smlp.checkpoints.folders import latest_iteration
from megatron_smlp.durable import write_durably
from megatron_smlp.errors import UsageError
from megatron_smlp.lease import Lease, Observer, holder_of, take
from megatron_smlp.plugin_files import KEY as PLUGIN
from megatron_smlp.study.hardware import hardware
from megatron_smlp.study.made_by import NOT_KNOWN, noted
from megatron_smlp.study.plan import Plan, PlannedRun, make_plan
from megatron_smlp.study.study_file import OTHERS, Study
from megatron_smlp.study.systems import System

CHECKPOINTS = "checkpoints"
ENDED = "ended.json"
RETRIED = "failed.json"
"""The renamed ENDED of a failed run that is being retried: its system waits, and no other does."""
BEGUN = "study.json"
EXPIRY = 120.0  # seconds
DONE, DIVERGED, FAILED = "done", "diverged", "failed"
MAY_CHANGE = (
    *("cluster", "flops_tolerance", "may_differ", "needed_flops_tolerance", "paper", "titles"),
    *("base", "fixed", "variants"),
)
"""Keys of a study that affect no run and no number in a verdict; the last three only determine the
flags, which are compared themselves."""


@dataclass(frozen=True, kw_only=True)
class State:
    """A study, the folder of its runs, and the losses of runs that are only in the results."""

    study: Study
    file: Path
    """The study file."""
    systems: Mapping[str, System]
    identity: str
    folder: Path
    kept: Mapping[str, dict[str, Any]]
    """How each run in the results ended, by its hash."""
    expiry: float = EXPIRY
    """Seconds without a heartbeat after which the worker of a run is presumed dead."""
    observer: Observer = field(default_factory=Observer, compare=False, repr=False)

    def plan(self) -> Plan:
        """Return the plan of the runs that are known so far."""
        endings = self._endings()
        losses = {
            key: float(ending["loss"])
            for key, ending in endings.items()
            if ending["status"] in (DONE, DIVERGED) and ending.get("loss") is not None
        }
        return make_plan(
            self.study, self.systems, identity=self.identity, losses=losses, failed=_failed(endings)
        )

    def _endings(self) -> dict[str, dict[str, Any]]:
        """Return how every run that is over ended, by its hash."""
        files = (file for name in (RETRIED, ENDED) for file in self.folder.glob(f"*/*/*/{name}"))
        endings = map(read_json, files)
        return {**self.kept, **{ending["key"]: ending for ending in endings if ending}}

    def failure(self, plan: Plan) -> str:
        """Say in a line which runs failed and how many wait for them; empty if none failed."""
        keys = _failed(self._endings())
        failed = [run for run in plan.runs if run.key in keys]
        untuned = {run.system for run in failed if run.phase == "tuning"}
        waiting = [run for run in plan.pending if run.system in untuned]
        waiting += [
            run for run in self.to_do(plan) if any(parent.key in keys for parent in run.parents)
        ]
        names = "; ".join(run.title for run in failed)
        return f"failed: {names}; blocked runs: {len(waiting)}" if failed else ""

    def folder_of(self, run: PlannedRun) -> Path:
        return self.folder / run.folder

    def ending(self, run: PlannedRun) -> dict[str, Any] | None:
        """Return how a run ended, here or in the results; None if it has not ended, or if it failed
        on another machine and may be tried again."""
        kept = self.kept.get(run.key)
        return self._ending_here(run) or (None if kept and kept["status"] == FAILED else kept)

    def _ending_here(self, run: PlannedRun) -> dict[str, Any] | None:
        return read_json(self.folder_of(run) / ENDED)

    def made_by(self, run: PlannedRun) -> dict[str, str]:
        """Return the commit and sources of a run that is over; empty if they are not known."""
        if self._ending_here(run):
            return noted(self.folder_of(run))
        kept = self.kept.get(run.key, {})
        return {name: kept.get(name, NOT_KNOWN) for name in ("commit", "sources")}

    def status(self, run: PlannedRun) -> str:
        """Return done, diverged, failed, running, or waiting."""
        ending = self.ending(run)
        if ending is not None:
            return str(ending["status"])
        return "running" if holder_of(self.folder_of(run)) else "waiting"

    def is_held(self, run: PlannedRun) -> bool:
        """Return whether a live worker holds a run."""
        folder = self.folder_of(run)
        return folder.exists() and self.observer.is_held(folder, expiry=self.expiry)

    def take(self, folder: Path) -> Lease | None:
        """Take the lease of a run's or other work's folder; None if another worker holds it."""
        folder.mkdir(parents=True, exist_ok=True)
        return take(folder, expiry=self.expiry, observer=self.observer)

    def retry_failures(self) -> None:
        """Let the runs that failed here be tried once more, by any of the workers."""
        for run in self.plan().runs:
            if (self._ending_here(run) or {}).get("status") == FAILED:
                with contextlib.suppress(FileNotFoundError):  # another worker was faster
                    (self.folder_of(run) / ENDED).replace(self.folder_of(run) / RETRIED)

    def to_do(self, plan: Plan) -> list[PlannedRun]:
        """Return unfinished runs, each after the parents whose checkpoints it needs and lacks."""
        needed: dict[str, PlannedRun] = {}
        for run in plan.runs:
            if self.ending(run) is None:
                for missing in reversed(self._lacking(run)):
                    needed.setdefault(missing.key, missing)
        return list(needed.values())

    def _lacking(self, run: PlannedRun) -> list[PlannedRun]:
        """Return a run and the parents that have to be trained first, nearest first."""

        def is_lacking(parent: PlannedRun) -> bool:
            return not self.has_checkpoint(parent) and not self.is_lost(parent)

        return [run, *itertools.takewhile(is_lacking, run.parents)]

    def is_lost(self, run: PlannedRun) -> bool:
        """Return whether a run ended in such a way that no other can continue from it."""
        ending = self.ending(run)
        return ending is not None and ending["status"] != DONE

    def has_checkpoint(self, run: PlannedRun) -> bool:
        """Return whether a run is done, and the checkpoint that others continue from is here."""
        is_done = (self._ending_here(run) or {}).get("status") == DONE
        # It may be in the middle of being retrained, for a child that is tried again.
        return is_done and (latest_iteration(self.folder_of(run) / CHECKPOINTS) or 0) >= run.end

    def description(self) -> dict[str, Any]:
        """Return everything that determines the runs of a study, as plain JSON."""
        asked = dataclasses.asdict(self.study)
        del asked["speed"]  # More rounds may be added at any time.
        content = {
            "study": asked,
            "flags": {name: dict(system.flags) for name, system in self.systems.items()},
            "identity": json.loads(self.identity),
        }
        plain: dict[str, Any] = json.loads(json.dumps(content))
        return plain

    def record(self, folder: Path) -> None:
        """Record in a folder which study its runs or results are of."""
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(folder / BEGUN, json.dumps(self.description(), indent=1) + "\n")

    def end(self, run: PlannedRun, **ending: Any) -> None:
        """Record how a run ended, and that it did so on this machine."""
        content = {"key": run.key, "title": run.title, "hardware": hardware(), **ending}
        write_durably(self.folder_of(run) / ENDED, json.dumps(content, indent=2) + "\n")


def _failed(endings: Mapping[str, dict[str, Any]]) -> set[str]:
    return {key for key, ending in endings.items() if ending["status"] == FAILED}


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; None if there is no such file."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return content


def check_unchanged(before: dict[str, Any], now: dict[str, Any], *, where: Path) -> None:
    """Check that a study is the one whose runs or results are in a folder.

    Systems may be added, seeds may be appended, and the keys in MAY_CHANGE may change: existing
    runs keep their hashes. The values of a system's flags matter, but not where they are written.

    Raises:
        UsageError: the study has changed; the message has the differences.
    """
    names = before["study"]["systems"]
    old, new = (_of_systems(side, names) for side in (before, now))
    for name, seeds in old["study"]["seeds"].items():
        if new["study"]["seeds"][name][: len(seeds)] == seeds:  # looks use the first ones
            new["study"]["seeds"][name] = seeds
    changes = differences(old, new)
    if changes:
        lines = "\n".join(f"  {change}" for change in changes)
        raise UsageError(
            f"the study or its data differ from what {where} was begun with: revert the changes, "
            f"or give the new one another `name`, or its own --runs and --results.\n{lines}"
        )


def _of_systems(content: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return the parts of a study's description that may not change, for these systems."""
    study, flags = content["study"], content["flags"]
    seeds = study["seeds"]
    kept = {name: value for name, value in study.items() if name not in MAY_CHANGE}
    kept["systems"] = [name for name in names if name in study["systems"]]
    kept["seeds"] = {name: seeds.get(name, seeds.get(OTHERS, [])) for name in names}
    own = {
        name: {key: value for key, value in flags[name].items() if key != PLUGIN}
        for name in names
        if name in flags
    }
    return {"study": kept, "flags": own, "identity": content["identity"]}


def differences(before: Any, now: Any, *, path: Sequence[str] = ()) -> list[str]:
    """Return `where: before -> now` for every difference between two JSON values."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = [*before, *(name for name in now if name not in before)]
        return [
            line
            for name in names
            for line in differences(before.get(name), now.get(name), path=(*path, name))
        ]
    return [] if before == now else [f"{'.'.join(path)}: {before} -> {now}"]
