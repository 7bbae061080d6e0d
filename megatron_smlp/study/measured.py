"""Measurements of a study's systems, and the estimates that compare them: means over seeds or, for
a design, minima over rates."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from megatron_smlp.study.metrics import SUFFIX_LOSS, VALIDATION_LOSS
from megatron_smlp.study.rates import Rates
from megatron_smlp.study.spread import Spread
from megatron_smlp.study.statistics import Difference, unknown
from megatron_smlp.study.study_file import Study
from megatron_smlp.study.systems import System
from megatron_smlp.study.tables import Tables

FITTED = 0
"""Stands in for a seed in `curves`, for the curve of a system's fitted minima."""


class Measured:
    def __init__(self, study: Study, systems: Mapping[str, System], tables: Tables) -> None:
        self.study = study
        self.systems = systems
        self.tables = tables
        self.at = functools.cache(self._at)
        """(horizon, field) -> the losses of all systems that train on these positions."""

    def _at(self, horizon: int, field: str) -> Spread | Rates:
        names = self.trained_on(field)
        return self.compared({name: self.tables.losses(name, horizon, field) for name in names})

    def compared(self, numbers: Mapping[str, Mapping[int, float]]) -> Spread | Rates:
        """Return the estimates that compare systems by one number per seed, such as its loss."""
        design = self.study.design
        if design is None:
            return Spread.of({name: list(own.values()) for name, own in numbers.items()})
        rates = {
            name: dict(zip(design.seeds, design.factors(name), strict=True)) for name in numbers
        }
        return Rates.of({
            name: [(rates[name][seed], number) for seed, number in own.items()]
            for name, own in numbers.items()
        })  # fmt: skip

    def at_end(self, field: str) -> Spread | Rates:
        return self.at(self.study.longest, field)

    def slope(self, system: str, rival: str) -> Difference:
        """Return how much `system` minus `rival` grows per doubling of tokens, over the runs with a
        finite loss at every horizon."""
        horizons, field = sorted(self.study.horizons), self.field(system, rival)
        x = [math.log2(self.tables.tokens(horizon)) for horizon in horizons]
        losses = {}
        for name in self.trained_on(field):
            own = [self.tables.losses(name, horizon, field) for horizon in horizons]
            losses[name] = {
                seed: values
                for seed in own[-1]
                if np.isfinite(values := [at.get(seed, math.inf) for at in own]).all()
            }
        if len(horizons) < 2 or not (losses.get(system) and losses.get(rival)):
            return unknown(math.nan, 0)
        if self.study.design is None:
            slopes = {
                name: {seed: float(np.polyfit(x, values, 1)[0]) for seed, values in own.items()}
                for name, own in losses.items()
            }
            return self.compared(slopes).difference(system, rival)
        at_each = (
            {name: {seed: values[place] for seed, values in own.items()}
             for name, own in losses.items()}
            for place in range(len(horizons))
        )  # fmt: skip
        fits = [fit for fit in map(self.compared, at_each) if isinstance(fit, Rates)]
        return Rates.slope(fits, x, system, rival)

    def field(self, *names: str) -> str:
        """Return the loss to compare these systems by: over the positions all of them train on."""
        behind = any(self.systems[name].predicts_suffix for name in names)
        return SUFFIX_LOSS if behind else VALIDATION_LOSS

    def trained_on(self, field: str) -> list[str]:
        """Return the systems that train on all positions which the loss `field` covers."""
        return [
            name
            for name, system in self.systems.items()
            if field == SUFFIX_LOSS or not system.predicts_suffix
        ]

    def rivals(self) -> list[str]:
        """Return the systems that the subject is compared with: all others or, for the paper's
        claims, those that are not an sMLP."""
        return [
            name
            for name, system in self.systems.items()
            if name != self.study.subject and not (self.study.paper and system.is_smlp)
        ]

    def curves(self, name: str, field: str) -> dict[int, tuple[list[float], list[float]]]:
        """Return tokens and losses over a system's horizons, ascending, by seed; for a design, a
        single curve of minima under the key FITTED."""
        if self.study.design is None:
            return {seed: self.tables.curve(name, seed, field) for seed in self.tables.seeds(name)}
        points = [
            (self.tables.tokens(horizon), self.at(horizon, field).mean(name).mean)
            for horizon in sorted(self.study.horizons)
        ]
        known = [point for point in points if math.isfinite(point[1])]
        return {FITTED: ([x for x, _ in known], [y for _, y in known])} if known else {}

    def lacking(self, name: str) -> list[int]:
        """Return a system's planned seeds that have no final loss yet."""
        losses = self.tables.losses(name, self.study.longest, VALIDATION_LOSS)
        return [seed for seed in self.study.seeds_of(name) if seed not in losses]

    def gaps(self, names: Iterable[str]) -> Iterator[str]:
        """Describe which of these systems' planned runs to the longest horizon are missing or
        diverged."""
        for name in sorted({*names}, key=list(self.systems).index):
            losses = self.tables.losses(name, self.study.longest, VALIDATION_LOSS)
            diverged = [seed for seed, loss in losses.items() if math.isinf(loss)]
            for seeds, what in ((self.lacking(name), "is missing"), (diverged, "diverged")):
                if seeds:
                    yield f"{self.systems[name].title}: seed {', '.join(map(str, seeds))} {what}"
