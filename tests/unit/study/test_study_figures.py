"""What a study's figures show."""

import shutil
from pathlib import Path

import pytest
from support.studies import drawing, loss_of, page_of, page_of_study, pretend, state_of, write_study

from megatron_smlp.study.figures import ALWAYS_ALIKE, _looks, speedup
from megatron_smlp.study.metrics import VALIDATION_LOSS
from megatron_smlp.study.plan import PlannedRun
from megatron_smlp.study.report import Page
from megatron_smlp.study.results import Results
from megatron_smlp.study.state import State


def noisy(run: PlannedRun) -> float:
    return 5.0 + run.seed % 3 / 100 * len(run.system) % 7


def test_of_how_many_seeds_a_loss_is_not_reached_is_said(known: State, tmp_path: Path):
    """One seed of three never comes to Switch's loss; all come to the Transformer's."""

    def loss(run: PlannedRun) -> float:
        is_slow = (run.system, run.seed) == ("smlp_deterministic", 12)
        return loss_of(run) + 0.1 * is_slow + 0.2 * (run.system == "transformer")

    pretend(known, loss)
    made = page_of(known, tmp_path)
    shown = "not reached by 1 of 3 seeds"
    assert f"| switch | {shown} | 0 to ∞ | 3 |" in made.text()
    [panel] = drawing(made).speedups(made.times).axes
    missed, reached = panel.texts
    assert missed.get_text() == shown
    assert reached.get_text() == f"{speedup(made.times[0])[0]:.2f}"
    left = panel.transAxes.inverted().transform(missed.get_transform().transform((0.01, 0)))
    assert left[0] == pytest.approx(0.01)


def test_a_system_looks_the_same_in_every_study():
    """And no two of a study alike, however many there are."""
    one, other = _looks(["hash", "hash_12_experts", "gmlp"]), _looks(["gmlp", "mixer", "hash"])
    assert (one["gmlp"], one["hash"]) == (other["gmlp"], other["hash"])
    own = [str(look) for look in _looks(ALWAYS_ALIKE).values()]
    assert str(one["hash_12_experts"]) not in {own[0], str(one["gmlp"]), str(one["hash"])}
    many = _looks([*ALWAYS_ALIKE, "mixer", "aft"]).values()
    assert len({str(look) for look in many}) == len(many)


def test_costs_are_the_tokens_of_the_runs(known: State, tmp_path: Path):
    """A horizon ends at the evaluation that is nearest to it: after 50, 100, 195 iterations."""
    pretend(known, loss_of)
    made = page_of(known, tmp_path)
    tokens, _ = made.measured.tables.curve("switch", 11, VALIDATION_LOSS)
    planned = [run for run in known.plan().runs if (run.system, run.seed) == ("switch", 11)]
    assert tokens == [2048 * run.end for run in planned if run.horizon]
    assert tokens != list(known.study.horizons)
    panel = drawing(made).losses(VALIDATION_LOSS, "").axes[0]
    assert list(panel.lines[0].get_xdata() * 1e3) == pytest.approx(tokens)
    assert made.measured.tables.tokens(known.study.longest) == tokens[-1]


def test_only_whole_sets_of_seeds_are_drawn_against_one_another(known: State, tmp_path: Path):
    """The one seed of the Transformer that was looked at may be its best or its worst; of the
    subject more were than of any other."""
    pretend(known, loss_of)
    seeds = {"smlp_deterministic": [11, 12, 13], "switch": [11, 12], "transformer": [12]}
    looked_at = [
        {"key": run.key, "system": run.system, "seed": run.seed, "kind": "position",
         "label": label, "value": 4.0 + 0.5 * (run.system == "switch") + 0.1 * run.seed}
        for run in known.plan().runs
        for label in ("0", "1-2")
        if run.horizon == known.study.longest and run.seed in seeds[run.system]
    ]  # fmt: skip
    Results(tmp_path / "results").add_evaluations(looked_at)
    made = page_of(known, tmp_path)
    [panel] = drawing(made).breakdown(["position"]).axes
    drawn = [list(line.get_ydata()) for line in panel.lines]
    assert drawn == [pytest.approx([0.5, 0.5]), [0.0, 0.0]]


def test_one_horizon_is_drawn_system_by_system(tmp_path: Path):
    """A curve of one point would show neither seeds nor intervals."""
    path = write_study(tmp_path, horizons=["200K"], seeds=[11, 12, 13])
    known = state_of(path, runs=tmp_path / "runs")
    pretend(known, loss_of)
    made = page_of(known, tmp_path)
    [panel] = drawing(made).losses(VALIDATION_LOSS, "").axes
    assert [label.get_text() for label in panel.get_yticklabels()] == list(known.systems)
    dots, means, ends = panel.lines[:3]
    seeds = list(made.measured.tables.losses("transformer", 200_000, VALIDATION_LOSS).values())
    assert list(dots.get_xdata()) == seeds
    assert means.get_xdata()[0] == pytest.approx(sum(seeds) / 3)
    assert ends.get_xdata()[0] < min(seeds) < max(seeds) < ends.get_xdata()[1]


def rings(made: Page) -> list[tuple[float, float]]:
    [panel] = drawing(made).learning_rates().axes
    lines = (line for line in panel.lines if line.get_fillstyle() == "none")
    return [(x, y) for line in lines for x, y in zip(*line.get_data(), strict=True)]


def test_a_ring_is_around_a_rate_that_was_chosen(known: State, tmp_path: Path):
    """Two systems' trials are over and the third's are not: none is chosen yet."""
    pretend(known, lambda run: loss_of(run) + abs(run.factor - 1))
    made = page_of(known, tmp_path)
    rates = [made.measured.systems[name].flags["lr"] for name in made.measured.systems]
    assert [x for x, _ in rings(made)] == pytest.approx(rates)
    for run in known.plan().runs:
        if run.phase == "main" or (run.system == "switch" and run.factor == 2):
            shutil.rmtree(known.folder_of(run), ignore_errors=True)
    shutil.rmtree(tmp_path / "results")
    assert rings(page_of(known, tmp_path)) == []


TITLES = {"switch": "Transformer, Switch", "smlp_deterministic": "sMLP of ours"}
TUNING = {"seed": 1, "horizon": "50K", "lr": [0.7, 1, 1.41]}


def test_titles_are_in_tables_and_figures(tmp_path: Path):
    made = page_of_study(tmp_path, noisy, titles=TITLES, tuning=TUNING)
    rows = [line for line in made.text().splitlines() if line.startswith("| ")]
    assert any("sMLP of ours - Transformer, Switch" in row for row in rows)
    assert not [row for row in rows if "switch" in row or "smlp_deterministic" in row]
    legends = [
        text.get_text()
        for _, figure in drawing(made).figures(made.times)
        for legend in figure.legends
        for text in legend.get_texts()
    ]
    assert "Transformer, Switch" in legends
    assert "switch" not in legends
