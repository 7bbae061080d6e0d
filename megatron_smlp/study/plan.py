"""Plan the runs of a study, as a function of the study, the data and the losses known so far.

Each seed of a system trains one trunk at a constant learning rate. For each horizon a branch leaves
the trunk, in which the learning rate decays; the longest horizon's decay ends the trunk itself:

    0 ---- trunk ----+---- trunk ----+---- trunk and decay to the longest horizon
                     +- decay, h1    +- decay, h2

Each piece is one command of pretrain_smlp.py, which resumes from its parent's last checkpoint. All
pieces read the data in the order of a run to the longest horizon.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from megatron_smlp.plugin_files import KEY as PLUGIN
from megatron_smlp.plugin_texts import LOADED
from megatron_smlp.study.study_file import OTHERS, Study
from megatron_smlp.study.systems import System

FIRST = (1, {"megatron-smlp": "0.1.0"})
"""The project's part of all run keys: frozen, since runs now note their sources (made_by.py)."""
HASH_DIGITS = 12
DIGITS = 3  # significant digits of the factor of a trial that is added at an edge

Losses = Mapping[str, float]
"""Final validation losses of finished runs, by their hash; infinite where a run diverged."""


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One command of pretrain_smlp.py."""

    system: str
    phase: Literal["tuning", "main"]
    factor: float
    """The learning rate, as a multiple of the one in the system's file."""
    seed: int
    horizon: int | None
    """The horizon, in tokens, that it is a result for; None for a piece of the trunk."""
    start: int
    """Iteration at which its parent ends; 0 without a parent."""
    end: int
    flags: Mapping[str, Any]
    """All flags of pretrain_smlp.py except paths."""
    parent: PlannedRun | None = None
    identity: str = field(repr=False)
    """Identifies the data and the package versions."""

    @cached_property
    def key(self) -> str:
        """Hash over flags, data, versions and parent: runs with equal hashes are the same. The code
        of plugins is not part of it, but of a run's sources (made_by.py)."""
        parent = self.parent.key if self.parent else None
        flags = {name: value for name, value in self.flags.items() if name != PLUGIN}
        # No flag tells a plugin that only changes the training, such as its learning rate.
        names = [Path(name).stem for name in self.flags.get(PLUGIN, ())]
        if bare := [name for name in names if name in LOADED and not LOADED[name].parts]:
            flags[PLUGIN] = bare
        content = json.dumps([flags, self.identity, parent], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:HASH_DIGITS]

    @property
    def parents(self) -> Iterator[PlannedRun]:
        """The runs that it continues, nearest first."""
        run = self.parent
        while run is not None:
            yield run
            run = run.parent

    @property
    def folder(self) -> Path:
        """Return the run's folder, relative to the study's."""
        return Path(self.system) / f"lr{self.factor:g}" / f"{self.seed}-{self.key}"

    @property
    def title(self) -> str:
        what = "trunk" if self.horizon is None else f"{self.horizon / 1e6:g}M"
        return f"{self.system}, lr x {self.factor:g}, seed {self.seed}, {what} ({self.phase})"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The runs that are known so far."""

    runs: tuple[PlannedRun, ...]
    """Parents before children."""
    factors: Mapping[str, float]
    """Chosen learning-rate factor of each tuned system; 1 without tuning, also for a design."""
    pending: tuple[PlannedRun, ...]
    """Stand-ins for the runs of systems whose tuning is unfinished or had a failed trial: of the
    same number and length."""

    @property
    def at_edge(self) -> list[str]:
        """Return the systems whose chosen learning rate is the lowest or highest of all their
        trials: a better one may lie beyond."""
        tried: dict[str, list[float]] = {}
        for run in self.runs:
            if run.phase == "tuning":
                tried.setdefault(run.system, []).append(run.factor)
        return [
            name
            for name, factor in self.factors.items()
            if name in tried and factor in (min(tried[name]), max(tried[name]))
        ]


def identity_of(contents: Mapping[str, str]) -> str:
    """Return what all runs of a study share besides their flags: data and package versions.

    Args:
        contents: the checksum of each dataset and of the tokenizer.
    """
    packages = ("megatron-core", "torch")
    versions = {name: metadata.version(name).partition("+")[0] for name in packages}
    return json.dumps([FIRST[0], FIRST[1] | versions, dict(contents)], sort_keys=True)


def make_plan(
    study: Study,
    systems: Mapping[str, System],
    *,
    identity: str,
    losses: Losses,
    failed: Collection[str],
) -> Plan:
    """Return the tuning's runs, and the main runs of systems whose learning rate is chosen.

    Args:
        failed: hashes of runs that failed, and so have no loss.
    """
    make = functools.partial(_run, study, identity=identity)
    tuning, factors = _tuning(study, systems, make, losses=losses, failed=failed)
    # The subject and its rivals come before systems that only ablations need, and in each group the
    # first seeds of all systems: an unfinished study can decide most claims, or compare them all.
    needed = [name for name in systems if name == study.subject or not systems[name].is_smlp]
    pairs = {
        name: list(zip(study.seeds_of(name), study.rates_of(name), strict=True)) for name in systems
    }
    rounds = max(map(len, pairs.values()))
    main = [
        run
        for group in (needed, [name for name in systems if name not in needed])
        for number in range(rounds)
        for name in group
        for seed, rate in pairs[name][number : number + 1]
        for run in _pieces(
            functools.partial(
                make, systems[name], phase="main", factor=rate or factors.get(name, 1.0), seed=seed
            ),
            study.horizons,
        )
    ]
    known = [run for run in main if run.system in factors]
    pending = tuple(run for run in main if run.system not in factors)
    return Plan(runs=(*tuning, *known), factors=factors, pending=pending)


def _tuning(
    study: Study,
    systems: Mapping[str, System],
    make: Callable[..., PlannedRun],
    *,
    losses: Losses,
    failed: Collection[str],
) -> tuple[list[PlannedRun], dict[str, float]]:
    """Return all known trials, and the chosen learning rates of systems whose tuning is done.

    When any system's best is at an edge, all systems get another trial. Once no more trials can
    follow, systems no longer wait for one another. A system with a failed trial has no rate yet,
    and the others do not wait for it.
    """
    tuning = study.tuning
    if tuning is None:
        return [], dict.fromkeys(systems, 1.0)
    factors = {name: list(tuning.lr[OTHERS]) for name in systems}
    for extension in range(tuning.extend_at_edge + 1):
        runs = {
            name: [
                make(
                    system, phase="tuning", factor=factor, seed=tuning.seed, horizon=tuning.horizon
                )
                for factor in factors[name]
            ]
            for name, system in systems.items()
        }
        known = {
            name: [losses.get(run.key) for run in trials]
            for name, trials in runs.items()
            if not any(run.key in failed for run in trials)
        }
        every = [run for trials in runs.values() for run in trials]
        best = {name: _best(factors[name], values) for name, values in known.items()}
        is_at_edge = any(best[name] in (min(factors[name]), max(factors[name])) for name in best)
        done = {name: best[name] for name, values in known.items() if None not in values}
        is_last = extension == tuning.extend_at_edge
        if len(done) < len(known) or not is_at_edge or is_last:
            break
        for name, values in known.items():
            factors[name].append(next_factor(factors[name], _finite(values)))
    return every, done if len(done) == len(known) or is_last else {}


def _finite(losses: Sequence[float | None]) -> list[float]:
    return [math.inf if loss is None or math.isnan(loss) else loss for loss in losses]


def _best(factors: Sequence[float], losses: Sequence[float | None]) -> float:
    return min(zip(_finite(losses), factors, strict=True))[1]


def next_factor(factors: Sequence[float], losses: Sequence[float]) -> float:
    """Return the most useful factor for one more trial: beyond a best edge, or next to the best.

    If any system's best is at an edge, every system gets a trial, so that all have equally many.
    """
    pairs = sorted(zip(factors, losses, strict=True))
    place = min(range(len(pairs)), key=lambda index: pairs[index][1])
    best, beside = pairs[place][0], pairs[max(0, place - 1) : place] + pairs[place + 1 : place + 2]
    near = min(beside, key=lambda pair: pair[1], default=(best / math.sqrt(2), 0.0))[0]
    return _rounded(math.sqrt(best * near) if len(beside) > 1 else best * best / near)


def _rounded(factor: float) -> float:
    return float(f"{factor:.{DIGITS}g}")


@dataclass(frozen=True, kw_only=True)
class Calendar:
    """Horizons in iterations, rounded to multiples of the evaluation interval."""

    evaluation: int
    batch: int
    """Tokens per iteration."""
    decay: float

    @classmethod
    def of(cls, study: Study, system: System) -> Calendar:
        batch = system.flags["global_batch_size"] * system.flags["seq_length"]
        shortest = min((*study.horizons, study.tuning.horizon if study.tuning else study.longest))
        evaluation = max(1, round(shortest / batch / study.evaluations))
        return cls(evaluation=evaluation, batch=batch, decay=study.decay)

    def end(self, horizon: int) -> int:
        """Return the iteration at which the horizon is reached."""
        return max(1, round(horizon / self.batch / self.evaluation)) * self.evaluation

    def start(self, horizon: int) -> int:
        """Return the iteration at which the learning rate begins to decay to the horizon."""
        end = self.end(horizon)
        return end - max(1, round(end * self.decay))


def _pieces(make: Callable[..., PlannedRun], horizons: Sequence[int]) -> Iterator[PlannedRun]:
    """Yield the pieces of one trunk and its branches."""
    *earlier, longest = sorted(horizons)
    trunk: PlannedRun | None = None
    for horizon in earlier:
        trunk = make(horizon=horizon, is_trunk=True, parent=trunk)
        yield trunk
        yield make(horizon=horizon, parent=trunk)
    yield make(horizon=longest, parent=trunk)


def _run(
    study: Study,
    system: System,
    *,
    factor: float,
    seed: int,
    phase: Literal["tuning", "main"],
    identity: str,
    horizon: int,
    is_trunk: bool = False,
    parent: PlannedRun | None = None,
) -> PlannedRun:
    """Make a run to `horizon`, or the piece of the trunk up to where its decay begins."""
    calendar = Calendar.of(study, system)
    last = calendar.end(study.longest)
    end = calendar.start(horizon) if is_trunk else calendar.end(horizon)
    decay_end = last if is_trunk else end
    flags = dict(system.flags) | {
        "seed": seed,
        # Megatron orders the samples for a run of this length, so all runs share it.
        "train_iters": last,
        "lr_decay_style": "WSD",
        "lr_decay_iters": decay_end,
        "lr_wsd_decay_iters": decay_end - calendar.start(study.longest if is_trunk else horizon),
        "eval_interval": calendar.evaluation,
        "save_interval": calendar.evaluation,
    }
    flags.setdefault("lr_wsd_decay_style", "minus_sqrt")
    flags |= {name: flags[name] * factor for name in ("lr", "min_lr") if flags.get(name)}
    if (fraction := flags.pop("lr_warmup_fraction", None)) is not None:
        # The warm-up is the same for every horizon.
        flags["lr_warmup_iters"] = round(fraction * calendar.end(min(study.horizons)))
    if end < last:
        flags["exit_interval"] = end
    return PlannedRun(
        system=system.name, phase=phase, factor=factor, seed=seed,
        horizon=None if is_trunk else horizon, start=parent.end if parent else 0, end=end,
        flags=flags, parent=parent, identity=identity,
    )  # fmt: skip
