"""What was measured of a study's systems, and what they are compared by: means over seeds, or, of a
design, minima over rates."""

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
"""In place of a seed: the curve of a system's fitted minima."""


class Measured:
    def __init__(self, study: Study, systems: Mapping[str, System], tables: Tables) -> None:
        self.study = study
        self.systems = systems
        self.tables = tables
        self.at = functools.cache(self._at)
        """(horizon, field) -> the losses of all systems that are trained on these positions."""

    def _at(self, horizon: int, field: str) -> Spread | Rates:
        names = self.trained_on(field)
        return self.compared({name: self.tables.losses(name, horizon, field) for name in names})

    def compared(self, numbers: Mapping[str, Mapping[int, float]]) -> Spread | Rates:
        """Return what systems are compared by: a number of each seed, as its loss."""
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
        """Return by how much `system` minus `rival` grows per doubling of the tokens, by the runs
        that have a finite loss at every horizon."""
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
        """Return the loss that these are compared by: of what all are trained to predict."""
        behind = any(self.systems[name].predicts_suffix for name in names)
        return SUFFIX_LOSS if behind else VALIDATION_LOSS

    def trained_on(self, field: str) -> list[str]:
        """Return the systems for which a loss is not of positions that they never trained on."""
        return [
            name
            for name, system in self.systems.items()
            if field == SUFFIX_LOSS or not system.predicts_suffix
        ]

    def rivals(self) -> list[str]:
        """Return the systems that the subject is compared with: all others, of which the paper's
        claims are about those that are not an sMLP."""
        return [
            name
            for name, system in self.systems.items()
            if name != self.study.subject and not (self.study.paper and system.is_smlp)
        ]

    def curves(self, name: str, field: str) -> dict[int, tuple[list[float], list[float]]]:
        """Return the tokens and losses of a system's horizons by seed, ascending; of a design one
        curve, of minima."""
        if self.study.design is None:
            return {seed: self.tables.curve(name, seed, field) for seed in self.tables.seeds(name)}
        points = [
            (self.tables.tokens(horizon), self.at(horizon, field).mean(name).mean)
            for horizon in sorted(self.study.horizons)
        ]
        known = [point for point in points if math.isfinite(point[1])]
        return {FITTED: ([x for x, _ in known], [y for _, y in known])} if known else {}

    def lacking(self, name: str) -> list[int]:
        """Return the seeds that are planned of a system and have no end yet."""
        losses = self.tables.losses(name, self.study.longest, VALIDATION_LOSS)
        return [seed for seed in self.study.seeds_of(name) if seed not in losses]

    def gaps(self, names: Iterable[str]) -> Iterator[str]:
        """Yield in words what was planned of these systems for the longest horizon and is missing
        or diverged."""
        for name in sorted({*names}, key=list(self.systems).index):
            losses = self.tables.losses(name, self.study.longest, VALIDATION_LOSS)
            diverged = [seed for seed, loss in losses.items() if math.isinf(loss)]
            for seeds, what in ((self.lacking(name), "is missing"), (diverged, "diverged")):
                if seeds:
                    yield f"{self.systems[name].title}: seed {', '.join(map(str, seeds))} {what}"
