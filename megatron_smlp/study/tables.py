"""The numbers of a study, looked up in its CSV files: losses by seed, curves, step times."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas

from megatron_smlp.study.results import TASK, Results
from megatron_smlp.study.state import DIVERGED, DONE

QUIET = 0.75
"""Timings count only if the matrix product before them reached this fraction of the best speed."""


@dataclass(frozen=True, kw_only=True)
class Tables:
    """The tables of results.py, with queries on them."""

    runs: pandas.DataFrame
    curves: pandas.DataFrame
    speed: pandas.DataFrame
    """Timings taken while the machine was quiet."""
    disturbed: pandas.DataFrame
    """Timings taken after a slow matrix product, which do not count."""
    evaluations: pandas.DataFrame
    """Results of evaluating the final checkpoints; see study/final.py."""

    @classmethod
    def of(cls, results: Results) -> Tables:
        speed = results.speed
        # Relative to the best: if many were disturbed, the median would be slow too.
        quiet = speed["gemm_tflops"] >= QUIET * speed["gemm_tflops"].max()
        return cls(
            runs=results.runs, curves=results.curves, evaluations=results.evaluations,
            speed=speed[quiet], disturbed=speed[~quiet],
        )  # fmt: skip

    def of_runs(self, keys: Collection[str]) -> Tables:
        """Return these tables without other runs, such as those at a rate no longer the best."""
        tables = {name: getattr(self, name) for name in ("runs", "curves", "evaluations")}
        return replace(self, **{
            name: table[table["key"].isin(keys)] for name, table in tables.items()
        })  # fmt: skip

    def labels(self, kind: str) -> list[str]:
        """Return the labels of a kind that were evaluated, in their order."""
        return list(dict.fromkeys(_where(self.evaluations, kind=kind)["label"]))

    def values(self, kind: str, label: str, system: str) -> dict[int, float]:
        """Return one evaluated number of each seed's final checkpoint."""
        lines = _where(self.evaluations, kind=kind, label=label, system=system)
        return {int(line.seed): float(line.value) for line in lines.itertuples()}

    def sampling_error(self, task: str, system: str) -> float:
        """Return the standard error that the finite number of questions gives a mean over seeds:
        all seeds saw the same ones, so it is that of one seed.
        """
        lines = _where(self.evaluations, kind=TASK, label=task, system=system)
        return float(lines["stderr"].astype(float).mean())

    def common_tasks(self, *systems: str) -> list[str]:
        return [
            task
            for task in self.labels(TASK)
            if all(self.values(TASK, task, system) for system in systems)
        ]

    def wrong_answers(self, system: str, tasks: Sequence[str]) -> dict[int, float]:
        """Return the percentage of wrong answers, averaged over these tasks, of each seed that has
        all of them."""
        scores = [self.values(TASK, task, system) for task in tasks]
        seeds = set.intersection(*map(set, scores)) if scores else ()
        return {
            seed: 100 * (1 - float(np.mean([values[seed] for values in scores])))
            for seed in sorted(seeds)
        }

    def questions_error(self, tasks: Sequence[str], *systems: str) -> float:
        """Return the standard error in percent that the finite number of questions gives a
        difference of `wrong_answers`, as if each system had been asked its own.

        This is an upper bound: all are asked the same, and what is hard for one is for the other.
        """
        squares = [self.sampling_error(task, system) ** 2 for task in tasks for system in systems]
        return 100 * math.sqrt(sum(squares)) / len(tasks) if tasks else math.nan

    @cached_property
    def converged(self) -> pandas.DataFrame:
        """Runs whose learning rate has decayed: the points that are compared."""
        runs = self.runs
        return runs[(runs["phase"] == "main") & runs["horizon"].notna()]

    def losses(self, system: str, horizon: int, field: str) -> dict[int, float]:
        """Return the final loss of each seed; infinite if it diverged, absent if it failed."""
        lines = self._ends.get((system, horizon), self.converged[:0])
        return {
            int(seed): math.inf if status == DIVERGED else float(loss)
            for seed, status, loss in zip(lines["seed"], lines["status"], lines[field], strict=True)
            if status in (DONE, DIVERGED)
        }

    @cached_property
    def _ends(self) -> Mapping[Any, pandas.DataFrame]:
        """System and horizon -> the runs that end there."""
        return dict(iter(self.converged.groupby(["system", "horizon"])))

    def curve(self, system: str, seed: int, field: str) -> tuple[list[float], list[float]]:
        """Return the tokens and losses of one seed's runs to each horizon, ascending."""
        lines = _where(self.converged, system=system, seed=seed)
        lines = lines[lines["status"].isin([DONE, DIVERGED])].sort_values("horizon")
        losses = [float(loss) for loss in lines[field].fillna(math.inf)]
        return [float(tokens) for tokens in lines["tokens"]], losses

    def tokens(self, horizon: int) -> float:
        """Return the tokens that all runs of a horizon are trained on: the horizon rounded to whole
        evaluation intervals; NaN before the first run has ended."""
        return float(_where(self.converged, horizon=horizon)["tokens"].astype(float).mean())

    def seeds(self, system: str) -> list[int]:
        """Return the seeds of a system that have a converged run."""
        return sorted({int(seed) for seed in _where(self.converged, system=system)["seed"]})

    def step_seconds(self, system: str) -> dict[int, float]:
        """Return the seconds per step in each round of the quiet timing."""
        lines = _where(self.speed, system=system)
        pairs = zip(lines["round"], lines["seconds_per_iteration"], strict=True)
        return {int(number): float(seconds) for number, seconds in pairs}

    def has_speed(self, *systems: str) -> bool:
        return all(self.step_seconds(system) for system in systems)

    def seconds_per_token(self, system: str) -> float:
        """Return the geometric mean over the rounds, as in ratios of times; NaN if the system was
        not timed."""
        return 1 / _geometric_mean(_where(self.speed, system=system)["tokens_per_second"])

    def share_of_gemm(self, system: str) -> float:
        """Return a system's FLOP/s over those of a large matrix product; NaN if not timed."""
        lines = _where(self.speed, system=system)
        return _geometric_mean(lines["tflops"] / lines["gemm_tflops"])

    def tokens_per_second(self, system: str) -> float:
        """Return the quiet speed, or else the median of the trainings; NaN if nothing has run."""
        if self.has_speed(system):
            return 1 / self.seconds_per_token(system)
        return float(_where(self.runs, system=system)["tokens_per_second"].astype(float).median())

    @property
    def trials(self) -> pandas.DataFrame:
        return self.runs[self.runs["phase"] == "tuning"]

    def loads(self, system: str, longest: int) -> pandas.DataFrame:
        """Return the logged expert loads of the runs that together train from the start to the
        longest horizon, sorted by tokens: in evaluations where there is a validation loss, in
        training elsewhere."""
        runs = _where(self.runs, system=system, phase="main")
        keys = runs["key"][runs["horizon"].isna() | (runs["horizon"] == longest)]
        lines = self.curves[self.curves["key"].isin(keys) & self.curves["load_max"].notna()]
        return lines.sort_values("tokens")


def _where(table: pandas.DataFrame, **values: Any) -> pandas.DataFrame:
    for name, value in values.items():
        table = table[table[name] == value]
    return table


def _geometric_mean(values: pandas.Series) -> float:
    return float(np.exp(np.log(values.astype(float)).mean())) if len(values) else math.nan
