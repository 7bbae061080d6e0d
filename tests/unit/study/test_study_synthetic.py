"""Whole studies with known truth: how often claims, intervals and looks are wrong."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas
import pytest
from support.studies import state_of, write_study

from megatron_smlp.study.measured import Measured
from megatron_smlp.study.metrics import VALIDATION_LOSS
from megatron_smlp.study.results import Results
from megatron_smlp.study.state import DONE, State
from megatron_smlp.study.statistics import CONFIRMED, LEVEL, REFUTED, UNDECIDED
from megatron_smlp.study.tables import Tables
from megatron_smlp.study.verdicts import claims_of, primary_looks

SD = 0.013
SHARED = 0.5
"""Share of a run's variance by which it deviates at all horizons alike."""
CURVATURE = 0.045
STUDIES = 120
HORIZONS = (100_000, 200_000, 400_000)
DESIGN = {"lr": [0.5, 0.71, 1, 1.41, 2], "seeds": [21, 22, 23, 24, 25]}
SYSTEMS = ["transformer", "switch", "hash", "smlp_deterministic"]
SUBJECT = "smlp_deterministic"


def studies(
    known: State, gaps: dict[str, float], *, slope: float = 0.0, seed: int
) -> Iterator[Measured]:
    """Yield studies in which systems end that far behind the subject, and `slope` more for each
    earlier doubling; under a design, each has a best rate and a curvature of its own."""
    study, rng = known.study, np.random.default_rng(seed)
    tables = Tables.of(Results(Path("none")))
    for _ in range(STUDIES):
        lines = []
        for name in known.systems:
            best, bend = rng.uniform(-0.5, 0.5), CURVATURE * rng.normal(1, 0.15)
            for run, rate in zip(study.seeds_of(name), study.rates_of(name), strict=True):
                off = bend * (math.log2(rate) - best) ** 2 if rate else 0.0
                shared = math.sqrt(SHARED) * rng.standard_normal()
                for place, horizon in enumerate(HORIZONS):
                    noise = SD * (shared + math.sqrt(1 - SHARED) * rng.standard_normal())
                    late = slope * (len(HORIZONS) - 1 - place) * (name != SUBJECT)
                    loss = 4 - 0.1 * place + gaps.get(name, 0.0) + late + off + noise
                    lines.append({
                        "key": f"{name}{run}{horizon}", "system": name, "seed": run,
                        "phase": "main", "status": DONE, "horizon": horizon, "tokens": horizon,
                        VALIDATION_LOSS: loss,
                    })  # fmt: skip
        yield Measured(study, known.systems, replace(tables, runs=pandas.DataFrame(lines)))


@pytest.fixture(params=["seeds", "design"])
def planned(request: pytest.FixtureRequest, tmp_path: Path) -> State:
    how = {"seeds": {"seeds": [11, 12, 13]}, "design": {"seeds": None, "design": DESIGN}}
    pair = [SUBJECT, "hash"]
    path = write_study(tmp_path, systems=SYSTEMS, paper=False, primary=pair, **how[request.param])
    return state_of(path, runs=tmp_path)


def verdicts(measured: list[Measured]) -> list[str]:
    return [claims_of(each)[0].verdict for each in measured]


def test_what_is_not_so_is_confirmed_as_seldom_as_alpha_says(planned: State):
    """One rival is as good and the others far behind, where false claims are most frequent."""
    made = list(studies(planned, {"transformer": 0.2, "switch": 0.2}, seed=1))
    ends = [primary_looks(measured)[-1].verdict for measured in made]
    for said, most in ((verdicts(made), 0.06), (ends, 0.08)):
        assert said.count(CONFIRMED) <= most * STUDIES
        assert said.count(REFUTED) <= most * STUDIES


@pytest.mark.parametrize(
    ("switch", "hash_", "expected", "share"),
    [(0.1, 0.06, CONFIRMED, 0.9), (0.1, -0.08, REFUTED, 0.9), (0.2, 0.02, UNDECIDED, 0.25)],
)
def test_what_is_so_is_found_with_power(
    planned: State, switch: float, hash_: float, expected: str, share: float
):
    gaps = {"transformer": 0.2, "switch": switch, "hash": hash_}
    made = itertools.islice(studies(planned, gaps, seed=2), STUDIES // 3)
    said = verdicts(list(made))
    assert said.count(expected) > share * len(said)
    assert {CONFIRMED: REFUTED, REFUTED: CONFIRMED, UNDECIDED: REFUTED}[expected] not in said


def test_intervals_cover_and_two_that_differ_by_the_margin_are_seldom_called_level(planned: State):
    """The gap to HASH is 0.03 at the end, after growing by 0.01 a doubling."""
    gaps = {"transformer": 0.2, "switch": 0.2, "hash": 0.03}
    made = list(studies(planned, gaps, slope=-0.01, seed=6))
    half = STUDIES // 2  # a verdict takes as long as all else together
    assert verdicts(made[:half]).count(LEVEL) <= 0.08 * half
    ends = [each.at_end(VALIDATION_LOSS).difference(SUBJECT, "hash") for each in made]
    slopes = [each.slope(SUBJECT, "hash") for each in made]
    for found, truth in ((ends, -0.03), (slopes, -0.01)):
        assert 0.89 < np.mean([each.low < truth < each.high for each in found]) < 0.995
        assert np.mean([each.mean for each in found]) == pytest.approx(truth, abs=0.004)
    # With independent runs their errors would be 1.4 times as large, and they would always cover.
    assert np.median([each.high - each.low for each in slopes]) < 0.04


def test_no_slope_without_two_horizons_or_a_whole_run(planned: State):
    measured = next(studies(planned, {}, seed=7))
    assert math.isfinite(measured.slope(SUBJECT, "hash").high)
    runs = measured.tables.runs
    runs = runs[(runs["system"] != "hash") | (runs["horizon"] == HORIZONS[-1])]
    fewer = Measured(measured.study, measured.systems, replace(measured.tables, runs=runs))
    assert measured.slope(SUBJECT, "hash").n > fewer.slope(SUBJECT, "hash").n == 0
    assert math.isfinite(fewer.slope(SUBJECT, "switch").high)
