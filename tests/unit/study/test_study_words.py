"""What a report and its figures say: of a study that is not the paper's, by titles, and why."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.colors
import pytest
from matplotlib.axes import Axes
from support.studies import pretend, state_of, write_study

from megatron_smlp.study import cli
from megatron_smlp.study.figures import Drawing
from megatron_smlp.study.metrics import VALIDATION_LOSS
from megatron_smlp.study.plan import PlannedRun
from megatron_smlp.study.report import Page
from megatron_smlp.study.results import Results
from megatron_smlp.study.state import begin, description
from megatron_smlp.study.verdicts import primary_looks

TITLES = {"switch": "Transformer, Switch", "smlp_deterministic": "sMLP of ours"}
TUNING = {"seed": 1, "horizon": "50K", "lr": [0.7, 1, 1.41]}


def page(folder: Path, loss_of: Callable[[PlannedRun], float], **changes: Any) -> Page:
    known = state_of(write_study(folder, **changes), runs=folder / "runs")
    pretend(known, loss_of)
    results = Results(folder / "results")
    results.collect(known)
    return Page(known, results)


def drawing(made: Page) -> Drawing:
    return Drawing(made.study, made.systems, made.tables, made.plan.factors)


def noisy(run: PlannedRun) -> float:
    return 5.0 + run.seed % 3 / 100 * len(run.system) % 7


def test_a_study_of_ones_own_is_not_about_the_paper(tmp_path: Path):
    """A pair that would be of C5, and a rival that is an sMLP itself, are as any other."""
    pair = ["smlp_deterministic", "smlp_partial"]
    systems = ["transformer", "switch", *pair]
    for is_papers, claims in ((True, ["C1", "C2", "C3", "C4"]), (False, ["lowest"])):
        folder = tmp_path / str(is_papers)
        folder.mkdir()
        made = page(folder, noisy, systems=systems, paper=is_papers, ablations=[pair])
        assert [claim.name for claim in made.claims] == claims
        assert ("paper" in made.text()) == is_papers
    # The pair is asked for already, as that of a claim's.
    assert [each.other for each in made.claims[0].comparisons] == [
        "transformer", "switch", "smlp_partial"
    ]  # fmt: skip


def test_plan_counts_full_squares(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for is_papers in (True, False):
        path = write_study(tmp_path, paper=is_papers)
        words = ["plan", str(path), "--runs", str(tmp_path), "--results", str(tmp_path)]
        assert cli.main(words) == 0
        assert ("full squares (paper)" in capsys.readouterr().out) == is_papers


def test_the_file_is_named_where_it_is(tmp_path: Path):
    text = page(tmp_path, noisy).text()
    assert f"`tools/study.py report {tmp_path / 'study.yaml'}`" in text


def test_it_is_said_why_something_is_undecided(tmp_path: Path):
    wobble = {11: 0.03, 12: -0.03, 13: 0.0}

    def loss_of(run: PlannedRun) -> float:
        """Switch is as good; the others are behind, with p below 0.05 but for Holm's steps."""
        behind = {"switch": 0.0, "transformer": 0.065, "hash": 0.065, "smlp_deterministic": 0.0}
        return 5.0 + behind[run.system] + wobble[run.seed]

    seeds = {"hash": [11, 12], "others": [11, 12, 13]}
    systems = ["switch", "transformer", "hash", "smlp_deterministic"]
    lines = page(tmp_path, loss_of, systems=systems, seeds=seeds).text().splitlines()
    said = [line for line in lines if line.startswith("* C1, loss: ")]
    assert said == [
        "* C1, loss: smlp_deterministic - switch is undecided: the 95 % interval holds 0.",
        "* C1, loss: smlp_deterministic - transformer is undecided: p is 0.126 after Holm, as not "
        "all of its claim hold; the interval of this pair alone leaves out 0.",
        "* C1, loss: smlp_deterministic - hash is undecided: 2 of the 3 seeds that a verdict "
        "takes.",
    ]


def test_titles_are_in_tables_and_figures(tmp_path: Path):
    made = page(tmp_path, noisy, titles=TITLES, tuning=TUNING)
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


def test_titles_may_be_given_at_any_time(tmp_path: Path):
    for more in ({}, {"titles": TITLES}):
        known = state_of(write_study(tmp_path, **more), runs=tmp_path)
        begin(known.folder, description(known.study, known.systems, known.identity))


def test_the_subject_is_drawn_strongest(tmp_path: Path):
    made = page(tmp_path, noisy, tuning=TUNING)
    draw = drawing(made)
    own = draw.looks["smlp_deterministic"]["color"]
    for figure in (draw.losses(VALIDATION_LOSS, ""), draw.evaluations(), draw.learning_rates()):
        for panel in figure.axes:
            others, subject = widths(panel, own)
            assert subject > 1.5 * others


def widths(panel: Axes, color: str) -> tuple[float, float]:
    """The widest line of the others and of this color, which lies above them."""
    lines = [line for line in panel.get_lines() if line.get_linestyle() != "None"]
    own = [line for line in lines if matplotlib.colors.same_color(line.get_color(), color)]
    rest = [line for line in lines if line not in own]
    assert min(line.get_zorder() for line in own) > max(line.get_zorder() for line in rest)
    return max(line.get_linewidth() for line in rest), max(line.get_linewidth() for line in own)


def test_ticks_of_rates_are_round(tmp_path: Path):
    """The trials are at 0.0014, 0.002 and 0.00282."""
    made = page(tmp_path, noisy, tuning=TUNING)
    [panel] = drawing(made).learning_rates().axes
    drawn = [float(f"{tick:.6g}") for tick in panel.get_xticks()]
    assert 0.002 in drawn
    assert all(len(f"{tick:g}".strip("0.")) <= 2 for tick in drawn)


def test_the_primary_comparison_is_looked_at_as_seeds_come_in(tmp_path: Path):
    """In the order of the file: without the second seed of five there is no look yet."""
    pair = ["smlp_deterministic", "switch"]
    wobble = {11: 0.0, 12: 0.01, 13: -0.01, 14: 0.005, 15: -0.005}

    def loss_of(run: PlannedRun) -> float:
        return 5.0 + wobble[run.seed] + 0.04 * (run.system == "switch")

    made = page(tmp_path, loss_of, seeds=[*wobble], primary=pair)
    assert [(each.found.n, each.verdict) for each in made.looks] == [
        (3, "undecided"), (5, "confirmed"),
    ]  # fmt: skip
    rows = made.text().split("## Primary comparison")[1].split("## Claims")[0]
    assert "| 3 | 0.0005 | 0.0005 | -0.04 |" in rows
    assert "| 5 | 0.0087 | 0.0092 | -0.04 |" in rows
    assert len(json.loads(made.json())["primary"]) == 2
    keys = {
        run.key for run in made.plan.runs
        if (run.system, run.horizon, run.seed) != ("switch", made.study.longest, 12)
    }  # fmt: skip
    assert primary_looks(made.study, made.systems, made.tables.of_runs(keys)) == []
