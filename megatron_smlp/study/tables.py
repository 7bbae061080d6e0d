"""The numbers of a study, looked up in its CSV files: losses by seed, curves, step times."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas

from megatron_smlp.study.metrics import VALIDATION_LOSS
from megatron_smlp.study.results import TASK, Results
from megatron_smlp.study.state import DIVERGED, DONE
from megatron_smlp.study.study_file import Study

LAST_EVALUATIONS = 6
LEAST_EVALUATIONS = 4  # a line through three says little of their noise
QUIET = 0.75
"""What was timed behind a matrix product of less of the best one's speed does not count."""


@dataclass(frozen=True, kw_only=True)
class Tables:
    """The tables of results.py, and what is asked of them."""

    runs: pandas.DataFrame
    curves: pandas.DataFrame
    speed: pandas.DataFrame
    """What was timed while the machine was quiet."""
    disturbed: pandas.DataFrame
    """What was timed behind a slow matrix product, which does not count."""
    found: pandas.DataFrame
    """Results of evaluating the final checkpoints; see study/final.py."""

    @classmethod
    def of(cls, results: Results) -> Tables:
        """Return those of a folder of results."""
        speed = results.speed
        # Of the best: of many disturbed ones the median would be as slow.
        quiet = speed["gemm_tflops"] >= QUIET * speed["gemm_tflops"].max()
        return cls(
            runs=results.runs, curves=results.curves, found=results.evaluations,
            speed=speed[quiet], disturbed=speed[~quiet],
        )  # fmt: skip

    def of_runs(self, keys: Collection[str]) -> Tables:
        """Return these tables without other runs, as those of a rate that is no longer best."""
        own = {
            name: table[table["key"].isin(keys)]
            for name in ("runs", "curves", "found")
            for table in (getattr(self, name),)
        }
        return replace(self, **own)

    def labels(self, kind: str) -> list[str]:
        """Return what was looked at of a kind, in its order."""
        return list(dict.fromkeys(self.found[self.found["kind"] == kind]["label"]))

    def values(self, kind: str, label: str, system: str) -> dict[int, float]:
        """Return a number of each seed's final checkpoint."""
        lines = self._found(kind, label, system)
        return {int(line.seed): float(line.value) for line in lines.itertuples()}

    def sampling_error(self, task: str, system: str) -> float:
        """Return the standard error of a mean over seeds that the finite number of questions gives
        it: all seeds saw the same ones, so it is that of one.
        """
        return float(self._found(TASK, task, system)["stderr"].astype(float).mean())

    def common_tasks(self, *systems: str) -> list[str]:
        """Return the tasks that all of these systems have."""
        return [
            task
            for task in self.labels(TASK)
            if all(self.values(TASK, task, system) for system in systems)
        ]

    def wrong_answers(self, system: str, tasks: Sequence[str]) -> dict[int, float]:
        """Return the share of wrong answers in percent, as a mean over these tasks, of each seed
        that has all of them."""
        scores = [self.values(TASK, task, system) for task in tasks]
        seeds = set.intersection(*map(set, scores)) if scores else ()
        return {
            seed: 100 * (1 - float(np.mean([values[seed] for values in scores])))
            for seed in sorted(seeds)
        }

    def questions_error(self, tasks: Sequence[str], *systems: str) -> float:
        """Return the standard error in percent that the finite number of questions gives a
        difference of `wrong_answers`, as if each system had been asked its own.

        All are asked the same, and what is hard for one is for the other: it is an upper bound.
        """
        squares = [self.sampling_error(task, system) ** 2 for task in tasks for system in systems]
        return 100 * math.sqrt(sum(squares)) / len(tasks) if tasks else math.nan

    def unscored(self, study: Study, systems: Iterable[str]) -> Iterator[str]:
        """Yield which tasks of which systems and seeds were not scored, in words."""
        for system in systems:
            lacking: dict[tuple[int, ...], list[str]] = {}
            for task in self.labels(TASK):
                scored = self.values(TASK, task, system)
                seeds = tuple(seed for seed in study.seeds_of(system) if seed not in scored)
                lacking.setdefault(seeds, []).append(task)
            for seeds, tasks in lacking.items():
                if seeds:
                    title = study.titles.get(system, system)
                    yield f"{title}: seed {', '.join(map(str, seeds))} lacks {', '.join(tasks)}"

    def _found(self, kind: str, label: str, system: str) -> pandas.DataFrame:
        lines = self.found
        is_it = (lines["kind"] == kind) & (lines["label"] == label) & (lines["system"] == system)
        return lines[is_it]

    @property
    def converged(self) -> pandas.DataFrame:
        """Runs whose learning rate has decayed: they are the points that are compared."""
        runs = self.runs
        return runs[(runs["phase"] == "main") & runs["horizon"].notna()]

    def losses(self, system: str, horizon: int, field: str) -> dict[int, float]:
        """Return the final loss of each seed; infinite where it diverged, none where it failed."""
        runs = self.converged
        lines = runs[(runs["system"] == system) & (runs["horizon"] == horizon)]
        return {
            int(line["seed"]): math.inf if line["status"] == DIVERGED else float(line[field])
            for _, line in lines.iterrows()
            if line["status"] in (DONE, DIVERGED)
        }

    def points(self, system: str, horizon: int, field: str) -> list[tuple[float, float]]:
        """Return the multiple of a system's rate and the final loss of each run, as `losses`."""
        runs = self.converged
        lines = runs[(runs["system"] == system) & (runs["horizon"] == horizon)]
        losses = self.losses(system, horizon, field)
        return [(float(line["factor"]), losses[line["seed"]])
                for _, line in lines.iterrows() if line["seed"] in losses]  # fmt: skip

    def curve(self, system: str, seed: int, field: str) -> tuple[list[float], list[float]]:
        """Return the tokens of each horizon's run and the losses of one seed, ascending."""
        runs = self.converged
        lines = runs[(runs["system"] == system) & (runs["seed"] == seed)]
        lines = lines[lines["status"].isin([DONE, DIVERGED])].sort_values("horizon")
        losses = [float(loss) for loss in lines[field].fillna(math.inf)]
        return [float(tokens) for tokens in lines["tokens"]], losses

    def tokens(self, horizon: int) -> float:
        """Return the tokens that the runs of a horizon are trained on, all of them as many: those
        of the whole evaluation intervals that are nearest to it; NaN before the first has ended."""
        runs = self.converged
        return float(runs[runs["horizon"] == horizon]["tokens"].astype(float).mean())

    def seeds(self, system: str) -> list[int]:
        """Return the seeds of a system that have a converged run."""
        runs = self.converged
        return sorted({int(seed) for seed in runs[runs["system"] == system]["seed"]})

    def gaps(self, study: Study, systems: Iterable[str]) -> tuple[str, ...]:
        """Return what was planned of these systems for the longest horizon and is missing or
        diverged, in words."""
        return tuple(self._gaps(study, set(systems)))

    def lacking(self, study: Study, system: str) -> list[int]:
        """Return the seeds that are planned of a system and have no end yet."""
        found = self.losses(system, study.longest, VALIDATION_LOSS)
        return [seed for seed in study.seeds_of(system) if seed not in found]

    def _gaps(self, study: Study, systems: set[str]) -> Iterator[str]:
        for system in study.systems:
            if system not in systems:
                continue
            found = self.losses(system, study.longest, VALIDATION_LOSS)
            title = study.titles.get(system, system)
            if missing := self.lacking(study, system):
                yield f"{title}: seed {', '.join(map(str, missing))} is missing"
            diverged = [str(seed) for seed, loss in found.items() if math.isinf(loss)]
            if diverged:
                yield f"{title}: seed {', '.join(diverged)} diverged"

    def step_seconds(self, system: str) -> dict[int, float]:
        """Return seconds of a step in each round of the quiet timing."""
        lines = self.speed[self.speed["system"] == system]
        pairs = zip(lines["round"], lines["seconds_per_iteration"], strict=True)
        return {int(number): float(seconds) for number, seconds in pairs}

    def has_speed(self, *systems: str) -> bool:
        """Return whether all of these were timed."""
        return all(self.step_seconds(system) for system in systems)

    def seconds_per_token(self, system: str) -> float:
        """Return the geometric mean of the rounds, of which ratios of times are made too; NaN where
        it was not timed."""
        lines = self.speed[self.speed["system"] == system]
        return 1 / _geometric_mean(lines["tokens_per_second"])

    def share_of_gemm(self, system: str) -> float:
        """Return its FLOP/s over those of a large matrix product; NaN where it was not timed."""
        lines = self.speed[self.speed["system"] == system]
        return _geometric_mean(lines["tflops"] / lines["gemm_tflops"])

    def tokens_per_second(self, system: str) -> float:
        """Return the quiet speed, or else the median of the trainings; NaN: nothing has run."""
        if self.has_speed(system):
            return 1 / self.seconds_per_token(system)
        runs = self.runs
        return float(runs[runs["system"] == system]["tokens_per_second"].astype(float).median())

    def evaluations(self, keys: list[str]) -> pandas.DataFrame:
        """Return the evaluations of these runs, by their tokens."""
        lines = self.curves[self.curves["key"].isin(keys)]
        return lines[lines[VALIDATION_LOSS].notna()].sort_values("tokens")

    def trunks(self, system: str, longest: int) -> list[pandas.DataFrame]:
        """Return, a seed, the runs that together train from the start to the longest horizon."""
        runs = self.runs[(self.runs["system"] == system) & (self.runs["phase"] == "main")]
        pieces = runs[runs["horizon"].isna() | (runs["horizon"] == longest)]
        return [own.sort_values("end") for _, own in pieces.groupby("seed")]

    def last_noise(self, system: str, longest: int, field: str) -> float:
        """Return the deviation of a trunk's last evaluations before its decay from a line."""
        found = []
        for trunk in self.trunks(system, longest):
            flags = json.loads(trunk["flags"].iloc[-1])
            lines = self.evaluations(list(trunk["key"]))
            constant = flags["lr_decay_iters"] - flags["lr_wsd_decay_iters"]
            lines = lines[lines["iteration"] <= constant].tail(LAST_EVALUATIONS)
            if len(lines) >= LEAST_EVALUATIONS:
                x, y = (lines[name].to_numpy(float) for name in ("tokens", field))
                squares = np.polyfit(x, y, 1, full=True)[1].item()
                found.append(math.sqrt(squares / (len(x) - 2)))
        return float(np.mean(found)) if found else math.nan


def _geometric_mean(values: pandas.Series) -> float:
    return float(np.exp(np.log(values.astype(float)).mean())) if len(values) else math.nan
