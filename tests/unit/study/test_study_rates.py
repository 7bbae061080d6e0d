"""Designs of rates and seeds: fits to data with known truth, plans, and reports."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import optimize
from support.studies import page_of, pretend, state_of, write_study

from megatron_smlp.study import rates
from megatron_smlp.study.figures import Drawing
from megatron_smlp.study.plan import PlannedRun
from megatron_smlp.study.rates import Rates
from megatron_smlp.study.state import State

RATES = (0.5, 0.71, 1.0, 1.41, 2.0)
CURVATURE = 0.045  # nats per octave squared, as measured for seven systems
SD = 0.013


def sample(
    minima: dict[str, tuple[float, float]], *, rng: np.random.Generator, at: tuple = RATES
) -> dict[str, list[tuple[float, float]]]:
    """Return points of systems with these best rates, in octaves, and minima."""
    return {
        name: [
            (rate, low + CURVATURE * (math.log2(rate) - best) ** 2 + SD * rng.standard_normal())
            for rate in at
        ]
        for name, (best, low) in minima.items()
    }


TRUTH = {"a": (0.3, 3.97), "b": (-0.4, 4.0), "c": (0.0, 4.1), "d": (0.7, 4.0)}


def test_without_noise_the_truth_is_found():
    found = Rates.of(sample(TRUTH, rng=np.random.default_rng(1)))
    exact = Rates.of({
        name: [(rate, low + CURVATURE * (math.log2(rate) - best) ** 2) for rate in RATES]
        for name, (best, low) in TRUTH.items()
    })  # fmt: skip
    assert exact.curvature == pytest.approx(CURVATURE)
    for name, (best, low) in TRUTH.items():
        assert exact.best(name) == pytest.approx(2**best)
        assert exact.mean(name).mean == pytest.approx(low)
    assert (found.df, found.difference("a", "b").n) == (4 * 5 - 9, 5)


def test_against_scipys_curve_fit(monkeypatch: pytest.MonkeyPatch):
    """curve_fit has the minima themselves as coefficients, and so gives their errors as well."""
    points = sample({"a": (0.3, 3.97), "b": (-0.4, 4.0)}, rng=np.random.default_rng(2))
    x, losses = (np.array([p[i] for own in points.values() for p in own]) for i in (0, 1))
    is_b = np.arange(10) >= 5

    def curve(x, gap, low, best_a, best_b, curvature):
        best = np.where(is_b, best_b, best_a)
        return low - gap * is_b + curvature * (np.log2(x) - best) ** 2

    fit, covariance = optimize.curve_fit(curve, x, losses, p0=[-0.03, 4, 0, 0, 0.04])
    found = Rates.of(points)
    one = found.difference("a", "b")
    assert (one.mean, found.df) == (pytest.approx(fit[0], abs=1e-6), 5)
    # Without what systems' own curvatures would add to the error.
    monkeypatch.setattr(rates, "BENDS", 0.0)
    assert found.difference("a", "b").error == pytest.approx(math.sqrt(covariance[0, 0]), rel=1e-3)
    assert one.error > found.difference("a", "b").error
    assert [math.log2(found.best(name)) for name in "ab"] == pytest.approx(fit[2:4], abs=1e-4)


def test_intervals_cover_where_curvatures_are_not_quite_the_same():
    """If one curvature were assumed, over `cpu`'s range they would cover 88 times in 100."""
    rng, covered = np.random.default_rng(8), []
    for _ in range(400):
        points = sample(TRUTH, rng=rng)
        for name, more in (("a", 0.01), ("b", -0.01)):
            best = TRUTH[name][0]
            points[name] = [
                (rate, loss + more * (math.log2(rate) - best) ** 2) for rate, loss in points[name]
            ]
        one = Rates.of(points).difference("a", "b")
        covered.append(one.low < -0.03 < one.high)
    assert np.mean(covered) > 0.92


def test_a_run_that_diverged_is_left_out_and_too_few_leave_a_system_unknown():
    points = sample(TRUTH, rng=np.random.default_rng(6))
    points["a"][-1] = (2.0, math.inf)
    points["b"][1:4] = [(rate, math.inf) for rate in RATES[1:4]]
    found = Rates.of(points)
    assert (found.difference("a", "c").n, found.difference("b", "c").p) == (4, 1.0)
    assert abs(found.mean("a").mean - 3.97) < 0.04
    assert math.isnan(found.best("b"))
    nothing = Rates.of({})
    assert (nothing.mean("a").p, nothing.df) == (1.0, 0)


DESIGN = {"lr": list(RATES), "seeds": [21, 22, 23, 24, 25]}
BEST = {"transformer": 0.0, "switch": 1.8, "smlp_deterministic": -0.4}


@pytest.fixture
def known(tmp_path: Path) -> State:
    primary = ["smlp_deterministic", "transformer"]
    path = write_study(tmp_path, seeds=None, design=DESIGN, primary=primary)
    return state_of(path, runs=tmp_path / "runs")


def loss_of(run: PlannedRun) -> float:
    """Return a loss: sMLP is 0.05 ahead at its best rate; Switch's is outside of its rates."""
    at = math.log2(run.factor) - BEST[run.system]
    noise = 0.004 * math.cos(7 * run.seed + len(run.system))
    ahead = 0.05 * (run.system == "smlp_deterministic")
    return 5.0 - 0.2 * math.log2((run.horizon or 1e5) / 1e5) - ahead + 0.045 * at**2 + noise


def test_a_plan_has_a_whole_training_for_each_pair_of_rate_and_seed(known: State):
    plan = known.plan()
    assert (plan.pending, plan.at_edge) == ((), [])
    for name, system in known.systems.items():
        ends = [run for run in plan.runs if (run.system, run.horizon) == (name, 400_000)]
        assert [(run.factor, run.seed) for run in ends] == list(
            zip(RATES, range(21, 26), strict=True)
        )
        assert [run.flags["lr"] for run in ends] == [system.flags["lr"] * rate for rate in RATES]
        assert {run.phase for run in ends} == {"main"}


def test_losses_that_fall_to_an_end_of_the_rates_are_compared_there():
    """Nothing is extrapolated, also where the losses are flat, or rise to a rate in the middle."""
    for bend in (0.003, 0.0, -0.01):
        made = Rates.of({
            name: [(2.0**x, low - 0.05 * x + bend * x**2) for x in (-1.0, -0.5, 0.0, 0.5, 1.0)]
            for name, low in (("a", 3.97), ("b", 4.0))
        })  # fmt: skip
        assert made.curvature == pytest.approx(bend, abs=1e-9)
        assert (made.at_edge, made.best("a")) == (["a", "b"], 2.0)
        assert made.mean("a").mean == pytest.approx(3.92 + bend)
        assert made.difference("a", "b").mean == pytest.approx(-0.03)


def test_intervals_cover_where_the_best_rate_is_not_among_those_trained():
    """Of the losses at the end of the rates: systems a and b get better beyond it."""
    truth = {"a": (-1.6, 3.97), "b": (-1.3, 4.0), "c": (0.0, 4.1), "d": (0.7, 4.0)}
    at_end = [low + CURVATURE * (best + 1) ** 2 for best, low in (truth["a"], truth["b"])]
    rng, covered = np.random.default_rng(9), []
    for _ in range(400):
        difference = Rates.of(sample(truth, rng=rng)).difference("a", "b")
        covered.append(difference.low < at_end[0] - at_end[1] < difference.high)
    assert np.mean(covered) > 0.93


def test_a_design_is_compared_by_its_minima(known: State, tmp_path: Path):
    pretend(known, loss_of)
    made = page_of(known, tmp_path)
    claims = {claim["name"]: claim for claim in json.loads(made.json())["claims"]}
    found = claims["C1"]["comparisons"][0]["difference"]
    # 15 runs minus 7 coefficients; at a common rate the two would differ by another 0.007.
    assert (found["df"] >= 8, found["n"]) == (True, 5)
    assert found["mean"] == pytest.approx(-0.05, abs=0.006)
    assert claims["C1"]["verdict"] == "confirmed"
    text = made.text()
    assert "At an edge of its rates lies the fitted best of: *switch*." in text
    assert claims["C2"]["verdict"] == "undecided"
    assert "* C2 is undecided, costs of fitted curves have no interval." in text
    [look] = made.looks
    assert (look.verdict, look.spent, look.difference.n) == ("confirmed", 0.05, 5)
    [panel] = Drawing(made.measured, made.plan.factors).learning_rates().axes
    rings = [line for line in panel.lines if line.get_fillstyle() == "none"]
    lr = known.systems["smlp_deterministic"].flags["lr"]
    assert rings[-1].get_xdata()[0] == pytest.approx(lr * 2**-0.4, rel=0.1)


def test_a_design_that_is_not_whole_has_no_look_at_its_primary_comparison(
    known: State, tmp_path: Path
):
    pretend(known, loss_of)
    [gone] = [
        run for run in known.plan().runs
        if (run.system, run.horizon, run.seed) == ("transformer", 400_000, 23)
    ]  # fmt: skip
    (known.folder_of(gone) / "ended.json").unlink()
    assert page_of(known, tmp_path).looks == []
