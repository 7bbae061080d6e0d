"""What systems are compared by: means over seeds, or, of a design, minima over rates."""

from __future__ import annotations

import math
from collections.abc import Mapping

from megatron_smlp.study.metrics import SUFFIX_LOSS
from megatron_smlp.study.rates import Rates
from megatron_smlp.study.spread import Spread
from megatron_smlp.study.study_file import Study
from megatron_smlp.study.systems import System
from megatron_smlp.study.tables import Tables

FITTED = 0
"""In place of a seed: the curve of a system's fitted minima."""


def trained_on(systems: Mapping[str, System], field: str) -> list[str]:
    """Return the systems for which a loss is not of positions that they never trained on."""
    return [
        name
        for name, system in systems.items()
        if field == SUFFIX_LOSS or not system.predicts_suffix
    ]


def numbers(
    study: Study, systems: Mapping[str, System], tables: Tables, *, horizon: int, field: str
) -> Spread | Rates:
    """Return the losses of all systems that are trained on these positions, at a horizon."""
    names = trained_on(systems, field)
    if study.design:
        return Rates.of({name: tables.points(name, horizon, field) for name in names})
    found = {name: tables.losses(name, horizon, field) for name in names}
    return Spread.of({name: list(losses.values()) for name, losses in found.items()})


def curves(
    study: Study, systems: Mapping[str, System], tables: Tables, *, name: str, field: str
) -> dict[int, tuple[list[float], list[float]]]:
    """Return the tokens and losses of a system's horizons by seed, ascending; of a design one
    curve, of minima."""
    if study.design is None:
        return {seed: tables.curve(name, seed, field) for seed in tables.seeds(name)}
    points = [
        (tables.tokens(horizon), numbers(study, systems, tables, horizon=horizon, field=field))
        for horizon in sorted(study.horizons)
    ]
    known = [(tokens, fit.mean(name).mean) for tokens, fit in points]
    known = [point for point in known if math.isfinite(point[1])]
    return {FITTED: ([tokens for tokens, _ in known], [loss for _, loss in known])} if known else {}
