"""What a study's figures show."""

from pathlib import Path

import pytest
from matplotlib.colors import to_rgb
from support.studies import drawing, loss_of, page_of, page_of_study, pretend

from megatron_smlp.study.figures import speedup
from megatron_smlp.study.metrics import VALIDATION_LOSS
from megatron_smlp.study.plan import PlannedRun
from megatron_smlp.study.state import State


def test_of_how_many_seeds_a_loss_is_not_reached_is_said(known: State, tmp_path: Path):
    """One seed of three never reaches Switch's loss; all reach the Transformer's."""

    def loss(run: PlannedRun) -> float:
        is_slow = (run.system, run.seed) == ("smlp_deterministic", 12)
        return loss_of(run) + 0.1 * is_slow + 0.2 * (run.system == "transformer")

    pretend(known, loss)
    made = page_of(known, tmp_path)
    shown = "not reached by 1 of 3 seeds"
    assert f"| switch | {shown} | n/a | 3 |" in made.text()
    [panel] = drawing(made).speedups(made.times).axes
    missed, reached = panel.texts
    assert missed.get_text() == shown
    assert reached.get_text() == f"{speedup(made.times[0])[0]:.2f}"


def test_costs_are_the_tokens_of_the_runs(known: State, tmp_path: Path):
    """A horizon ends at the evaluation nearest to it: after 50, 100, 195 iterations."""
    pretend(known, loss_of)
    made = page_of(known, tmp_path)
    tokens, _ = made.measured.tables.curve("switch", 11, VALIDATION_LOSS)
    planned = [run for run in known.plan().runs if (run.system, run.seed) == ("switch", 11)]
    assert tokens == [2048 * run.end for run in planned if run.horizon]
    assert tokens != list(known.study.horizons)
    panel = drawing(made).losses(VALIDATION_LOSS, "").axes[0]
    assert list(panel.lines[0].get_xdata() * 1e3) == pytest.approx(tokens)
    assert made.measured.tables.tokens(known.study.longest) == tokens[-1]


def test_titles_are_in_tables_and_figures(tmp_path: Path):
    titles = {"switch": "Transformer, Switch", "smlp_deterministic": "sMLP of ours"}
    made = page_of_study(tmp_path, loss_of, titles=titles)
    rows = [line for line in made.text().splitlines() if line.startswith("| ")]
    assert any("sMLP of ours - Transformer, Switch" in row for row in rows)
    assert not [row for row in rows if "switch" in row or "smlp_deterministic" in row]
    [legend] = drawing(made).losses(VALIDATION_LOSS, "").legends
    assert {*titles.values()} < {text.get_text() for text in legend.get_texts()}


def test_an_expert_without_tokens_is_drawn_above_the_edge(known: State, tmp_path: Path):
    """A logarithmic axis has no place for zero: the line would be missing."""
    pretend(known, loss_of)
    made = page_of(known, tmp_path)
    loads = made.measured.tables.loads("switch", known.study.longest).assign(load_min=0.0)
    [panel] = drawing(made).load({"switch": loads}).axes
    assert min(panel.lines[1].get_ydata()) > panel.get_ylim()[0]


def test_a_subject_of_ones_own_is_not_gray(tmp_path: Path):
    mine = {"mine": {"from": "smlp_deterministic"}}
    made = page_of_study(
        tmp_path, loss_of, systems=["switch", "mine"], subject="mine", variants=mine
    )
    assert len({*to_rgb(drawing(made).styles["mine"]["color"])}) > 1
