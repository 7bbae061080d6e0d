"""Results and reports, on runs that were never trained."""

import importlib.util
import json
import math
import re
import shutil
from pathlib import Path

import pandas
import pytest
from support.cover import slow_unless_in
from support.launches import REPOSITORY
from support.studies import (
    NOISE,
    claims_and_text,
    drawing,
    loss_of,
    page_of,
    page_of_study,
    pretend,
    state_of,
    study_argv,
    write_study,
)

from megatron_smlp.errors import UsageError
from megatron_smlp.study import cli
from megatron_smlp.study.data import StudyData
from megatron_smlp.study.made_by import FINGERPRINT_COLUMNS
from megatron_smlp.study.metrics import VALIDATION_LOSS
from megatron_smlp.study.plan import PlannedRun
from megatron_smlp.study.report import Page
from megatron_smlp.study.results import Results
from megatron_smlp.study.sizes import Sizes
from megatron_smlp.study.state import State
from megatron_smlp.study.verdicts import TOKENS, cost_ratio


def test_a_true_difference_is_confirmed_and_time_undecided_without_a_timing(
    known: State, tmp_path: Path
):
    pretend(known, loss_of)
    claims = claims_and_text(known, tmp_path)[0]
    verdicts = {name: claims[name]["verdict"] for name in ("C1", "C2", "C3")}
    assert verdicts == {"C1": "confirmed", "C2": "undecided", "C3": "undecided"}
    means = [claims[name]["comparisons"][0]["difference"]["mean"] for name in ("C1", "C2")]
    # 0.3 nats a doubling, 0.05 ahead: a sixth of the tokens between 200K and 400K is saved.
    assert means == [pytest.approx(-0.05, abs=0.005), pytest.approx(1 - 0.5 / 6, abs=0.01)]


def test_runs_of_a_rate_that_is_no_longer_best_do_not_count(known: State, tmp_path: Path):
    pretend(known, loss_of)
    before = claims_and_text(known, tmp_path)[0]
    path = tmp_path / "results" / "runs.csv"
    runs = pandas.read_csv(path)
    other = runs[(runs["phase"] == "main") & (runs["system"] == "switch")].copy()
    other["key"] = "0" + other["key"].str[1:]
    other["validation_loss"] = 1.0
    pandas.concat([runs, other]).to_csv(path, index=False)
    assert claims_and_text(known, tmp_path)[0] == before


def test_trials_and_experts_have_their_tables(tmp_path: Path):
    """A diverged trial has no loss; expert tables cover training and evaluations."""
    losses = {1: 5.25, 2: 5.125, 4: math.inf}

    def of_rate(run: PlannedRun) -> float:
        return losses[run.factor] if run.phase == "tuning" else 5.0

    tuning = {"seed": 1, "horizon": "400K", "lr": [*losses]}
    text = page_of_study(tmp_path, of_rate, tuning=tuning).text()
    assert re.search(r"\| system \| learning rate \| x 1 \| x 2 \| x 4 \|", text)
    assert re.search(r"\| switch \| [\d.]+ \| 5\.250 \| \*\*5\.125\*\* \|  \|", text)
    assert "| switch | 1 to 1 | 0.8 to 1.2 | 0.970 | 10.0% | 25.0% |" in text


def test_systems_that_all_deviate_differently_share_no_deviation(tmp_path: Path):
    wider = {"transformer": 1, "switch": 30, "smlp_deterministic": 900}
    text = page_of_study(tmp_path, lambda run: 5 + wider[run.system] * NOISE[run.seed] / 9).text()
    assert "not paired, each system with its own deviation and Welch's df; equal" in text
    assert "Outliers" not in text


def test_losses_of_one_horizon_are_drawn_where_the_subject_has_others(tmp_path: Path):
    """Its own are the losses behind its prefix."""
    systems = ["transformer", "smlp_partial"]
    made = page_of_study(
        tmp_path, loss_of, systems=systems, subject="smlp_partial", horizons=["100K"]
    )
    [panel] = drawing(made).losses(VALIDATION_LOSS, "").axes
    assert [label.get_text() for label in panel.get_yticklabels()] == ["transformer"]


def test_runs_that_another_study_made_are_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Runs match by content, whatever the other study calls the system; trials come first."""
    monkeypatch.setattr(StudyData, "contents", lambda _: {})
    tuning = {"seed": 1, "horizon": "100K", "lr": [1, 2]}
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    page_of_study(first, lambda run: 5.0 + abs(run.factor - 2), tuning=tuning)
    line = dict.fromkeys(FINGERPRINT_COLUMNS, "0") | {"system": "switch"}
    pandas.DataFrame([line]).to_csv(first / "results" / "fingerprints.csv", index=False)
    write_study(
        second, tuning=tuning, systems=["mine", "transformer", "smlp_partial"],
        subject="smlp_partial", variants={"mine": {"from": "switch"}},
    )  # fmt: skip
    folder = str(first / "results")
    argv = study_argv("reuse", second, "--of", folder, folder)  # a run that both have is taken once
    assert cli.main(argv) == 0
    # Each system has a trial of either rate, and for three seeds 5 pieces to three horizons.
    assert "34 runs taken over, 17 to do" in capsys.readouterr().out
    results = Results(second / "results")
    assert set(results.runs["system"]) == {"mine", "transformer"}
    assert set(results.runs.loc[results.runs["phase"] == "main", "factor"]) == {2}
    theirs = Results(first / "results").curves
    kept = theirs[theirs["key"].isin(results.runs["key"])]
    pandas.testing.assert_frame_equal(kept.reset_index(drop=True), results.curves)
    assert list(results.fingerprints["system"]) == ["mine"]
    assert cli.main(argv) == 0
    assert " 0 runs taken over, 17 to do" in capsys.readouterr().out


def test_runs_are_taken_over_from_each_size_of_another_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """By the folder of all its sizes; one without results, as before a report, is refused."""
    monkeypatch.setattr(StudyData, "contents", lambda _: {})
    known = state_of(write_study(tmp_path), runs=tmp_path / "runs")
    pretend(known, loss_of)
    Results(tmp_path / "theirs" / "small-D256").collect(known)
    shutil.rmtree(tmp_path / "runs")
    assert cli.main(study_argv("reuse", tmp_path, "--of", str(tmp_path / "theirs"))) == 0
    assert " taken over, 0 to do" in capsys.readouterr().out
    with pytest.raises(UsageError, match="holds no runs"):
        cli.main(study_argv("reuse", tmp_path, "--of", str(tmp_path / "runs")))


def test_the_csv_files_alone_give_the_same_report(known: State, tmp_path: Path):
    pretend(known, loss_of)
    first = page_of(known, tmp_path)
    shutil.rmtree(tmp_path / "runs")
    assert cli.main(study_argv("report", tmp_path)) == 0
    text = (tmp_path / "results" / "report.md").read_text(encoding="utf-8")
    first.figures = re.findall(r"!\[(.+)\]", text)
    assert text == first.text()
    figures = {path.name for path in (tmp_path / "results").glob("*.png")}
    # No system here trains only behind a prefix, which would have a figure of its own.
    names = {"loss.png", "learning-rates.png", "expert-load.png", "speed-up.png"}
    assert figures == names == {*first.figures}


def test_a_missing_and_a_diverged_run_are_said(known: State, tmp_path: Path):
    def loss(run: PlannedRun) -> float:
        bad = run.system == "switch" and run.seed == 12
        return math.inf if bad and run.horizon == 400000 else loss_of(run)

    pretend(known, loss)
    gone = [r for r in known.plan().runs if r.system == "transformer" and r.horizon == 400000]
    shutil.rmtree(known.folder_of(gone[-1]))
    claims, text = claims_and_text(known, tmp_path)
    assert claims["C1"]["notes"] == ["transformer: seed 13 is missing", "switch: seed 12 diverged"]
    assert claims["C1"]["verdict"] == "undecided"
    assert "diverged (1 of 3)" in text


def test_what_was_trained_past_the_end_of_a_run_is_not_of_its_curve(known: State, tmp_path: Path):
    pretend(known, loss_of)
    run = known.plan().runs[0]
    beyond = {"iteration": run.end + 1, "consumed_tokens": 10**6, "validation_loss": 1.0}
    step = {"loss": 1.0, "tokens_per_second": 1e9, "wall_seconds": 1e9}
    with (known.folder_of(run) / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(beyond | step)}\n" for _ in range(100))
    results = Results(tmp_path / "results")
    results.collect(known)
    [line] = [one for one in results.runs.itertuples() if one.key == run.key]
    assert line.tokens_per_second == 5000
    curve = results.curves[results.curves["key"] == run.key]
    assert curve["iteration"].max() == run.end


def without(known: State, system: str, *, seeds: tuple[int, ...], horizon: int | None) -> None:
    """Remove the runs of a system to a horizon, as if they were still running."""
    for run in known.plan().runs:
        if (run.system, run.horizon) == (system, horizon) and run.seed in seeds:
            shutil.rmtree(known.folder_of(run))


def test_seeds_that_are_on_their_way_do_not_count_as_the_fast_ones(known: State, tmp_path: Path):
    """Two are unfinished: one has already reached the target, the other may take forever."""
    ahead = {11: 0.4, 12: 0.0, 13: 0.5}

    def loss(run: PlannedRun) -> float:
        is_subject = run.system == "smlp_deterministic"
        return loss_of(run) - ahead.get(run.seed, 0) * is_subject

    pretend(known, loss)
    without(known, "smlp_deterministic", seeds=(11, 12), horizon=400_000)
    claims, _ = claims_and_text(known, tmp_path)
    assert claims["C2"]["comparisons"][0]["difference"]["n"] == 1
    assert "smlp_deterministic: seed 11, 12 is missing" in claims["C2"]["notes"]


def test_each_is_compared_with_each_by_its_cost(known: State, tmp_path: Path):
    """Losses lie on straight lines between horizons, so that shares are simple fractions."""
    behind = {"transformer": 0.3, "switch": 0.0, "smlp_deterministic": 0.075}

    def loss(run: PlannedRun) -> float:
        exact = 6.0 - 0.3 * math.log2((run.horizon or 10**5) / 10**5) + behind[run.system]
        return exact + 0.3 * ((run.system, run.seed) == ("transformer", 12))

    pretend(known, loss)
    made = page_of(known, tmp_path)
    tokens = [made.measured.tables.tokens(horizon) for horizon in known.study.horizons]
    switch, smlp = "switch", "smlp_deterministic"
    pairs = (switch, smlp), (smlp, switch), (switch, "transformer")
    costs = {pair: cost_ratio(made.measured, pair, unit=TOKENS) for pair in pairs}
    # Switch reaches sMLP's last loss three quarters of the way from horizon two to horizon three.
    share = (tokens[1] + 3 * tokens[2]) / 4 / tokens[2]
    assert costs["switch", "smlp_deterministic"].difference.mean == pytest.approx(share)
    assert costs["smlp_deterministic", "switch"].unreached == 3
    # Seed 12 of the Transformer ends at Switch's first loss, the others at its second horizon's.
    bound = costs["switch", "transformer"]
    mean = (tokens[1] ** 2 * tokens[0]) ** (1 / 3) / tokens[2]
    assert (bound.difference.mean, bound.is_bound) == (pytest.approx(mean), True)


def test_a_horizon_that_diverged_leaves_a_bound(known: State, tmp_path: Path):
    """One seed of the subject diverged at the first horizon, but is there at the next."""

    def loss(run: PlannedRun) -> float:
        if run.system != "smlp_deterministic":
            return loss_of(run)
        bad = run.seed == 12 and run.horizon == 100_000
        return math.inf if bad else loss_of(run) - 0.5 * (run.horizon == 200_000)

    pretend(known, loss)
    claims, text = claims_and_text(known, tmp_path)
    [comparison] = claims["C2"]["comparisons"]
    assert comparison["difference"]["n"] == 3
    assert 0.25 < comparison["difference"]["mean"] < 0.55
    assert comparison["is_bound"]
    assert "nan" not in text


RESULTS = REPOSITORY / "studies" / "results"
FOLDERS = [path.relative_to(RESULTS).as_posix() for path in sorted(RESULTS.glob("*/*"))]


@pytest.mark.parametrize("name", slow_unless_in(("rope/intel-xeon", "long/amd-epyc"), FOLDERS))
def test_a_kept_report_is_that_of_its_csv_files(name: str, tmp_path: Path):
    """With the study's file, as it was when the study began: `tools/study.py report` writes it."""
    folder = RESULTS / name
    study = REPOSITORY / "studies" / f"{folder.parent.name}.yaml"
    argv = ["report", str(study), "--runs", str(tmp_path), "--results", str(folder)]
    pages = []
    for known, results in cli.read_states(cli.build_parser().parse_args(argv)):
        pages.append(made := Page(known, results))
        if not len(results.runs):
            continue
        kept = (made.folder / "report.md").read_text(encoding="utf-8")
        named = re.findall(r"!\[(.+)\]", kept)
        made.figures = [name for name in named if (made.folder / name).exists()]
        assert made.text() == kept
        assert made.json() == (made.folder / "report.json").read_text(encoding="utf-8")
    if len(pages) > 1:
        kept = (folder / "report.md").read_text(encoding="utf-8")
        assert Sizes(folder.parent.name, pages).text() == kept


@pytest.mark.slow
def test_verdicts_by_both_rules_are_those_of_the_csv_files():
    path = REPOSITORY / "studies" / "both_rules.py"
    spec = importlib.util.spec_from_file_location("both_rules", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (REPOSITORY / "studies" / "results" / "both-rules.md").read_text(encoding="utf-8")
    assert "\n".join(module.lines()) + "\n" == page
