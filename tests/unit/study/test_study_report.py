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
    claims_and_text,
    drawing,
    loss_of,
    page_of,
    pretend,
    state_of,
    write_study,
)

from megatron_smlp.errors import UsageError
from megatron_smlp.study import cli
from megatron_smlp.study import results as results_module
from megatron_smlp.study import state as state_module
from megatron_smlp.study.data import StudyData
from megatron_smlp.study.plan import PlannedRun
from megatron_smlp.study.report import Page
from megatron_smlp.study.results import Results
from megatron_smlp.study.sections import crossing
from megatron_smlp.study.sizes import Sizes
from megatron_smlp.study.state import State, begin, description


def report(known: State, folder: Path) -> None:
    """Write the report by the command."""
    words = ["--runs", str(folder / "runs"), "--results", str(folder / "results")]
    words += ["--data", str(folder / "none")]  # not those of whoever runs studies here
    assert cli.main(["report", str(folder / "study.yaml"), *words]) == 0


def test_a_true_difference_is_confirmed_and_time_undecided_without_a_timing(
    known: State, tmp_path: Path
):
    pretend(known, loss_of)
    claims = claims_and_text(known, tmp_path)[0]
    verdicts = {name: claims[name]["verdict"] for name in ("C1", "C2", "C3")}
    assert verdicts == {"C1": "confirmed", "C2": "undecided", "C3": "undecided"}
    means = [claims[name]["comparisons"][0]["found"]["mean"] for name in ("C1", "C2")]
    # 0.3 nats a doubling, 0.05 ahead: between 200K and 400K tokens, a sixth of them fewer.
    assert means == [pytest.approx(-0.05, abs=0.005), pytest.approx(1 - 0.5 / 6, abs=0.01)]


def test_the_machines_of_the_runs_are_told(
    known: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A machine that collects another's runs does not take them for its own."""
    monkeypatch.setattr(state_module, "hardware", lambda: "one")
    pretend(known, loss_of)
    monkeypatch.setattr(state_module, "hardware", lambda: "another")
    runs = known.plan().runs
    known.end(runs[-1], status=state_module.DONE, loss=str(loss_of(runs[-1])), attempts=1)
    told = f"The runs were trained on another (1) and one ({len(runs) - 1}): repeated on the"
    assert told in claims_and_text(known, tmp_path)[1]


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


def test_the_csv_files_alone_give_the_same_report(known: State, tmp_path: Path):
    pretend(known, loss_of)
    report(known, tmp_path)
    results = tmp_path / "results"
    first = (results / "report.md").read_text(encoding="utf-8")
    for path in results.iterdir():
        if path.suffix not in (".csv",) and path.name != "study.json":
            path.unlink()
    shutil.rmtree(tmp_path / "runs")
    report(known, tmp_path)
    assert (results / "report.md").read_text(encoding="utf-8") == first
    figures = {path.stem for path in results.glob("*.png")}
    # No system here is trained on what is behind a prefix alone, which has a figure of its own.
    assert figures == {"loss", "evaluations", "learning-rates", "expert-load", "speed-up"}


def test_a_missing_and_a_diverged_run_are_said(known: State, tmp_path: Path):
    def loss(run: PlannedRun) -> float:
        bad = run.system == "switch" and run.seed == 12
        return math.inf if bad and run.horizon == 400000 else loss_of(run)

    pretend(known, loss)
    gone = [r for r in known.plan().runs if r.system == "transformer" and r.horizon == 400000]
    shutil.rmtree(known.folder_of(gone[-1]))
    claims, text = claims_and_text(known, tmp_path)
    assert claims["C1"]["notes"] == [
        "transformer: seed 13 is missing",
        "switch: seed 12 diverged",
    ]
    assert claims["C1"]["verdict"] == "undecided"
    assert "diverged (1 of 3)" in text


def test_trials_alone_are_reported(known: State, tmp_path: Path):
    """A study that has begun: there is nothing yet to draw against tokens."""
    pretend(known, loss_of)
    for run in known.plan().runs:
        if run.phase == "main":
            shutil.rmtree(known.folder_of(run))
    claims, _ = claims_and_text(known, tmp_path)
    assert claims["C1"]["verdict"] == "undecided"
    report(known, tmp_path)
    assert [path.stem for path in (tmp_path / "results").glob("*.png")] == ["learning-rates"]


def test_nothing_to_report(known: State, tmp_path: Path):
    with pytest.raises(UsageError, match="no run of study 'small' is over"):
        report(known, tmp_path)


@pytest.mark.usefixtures("undrawn")
def test_results_of_another_machine_are_pointed_to(
    known: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """A folder's name is that of the command's machine, as of a cluster's login node."""
    monkeypatch.setattr(results_module, "ROOT", tmp_path)
    monkeypatch.setattr(results_module, "hardware", lambda: "here")
    pretend(known, loss_of)
    there = tmp_path / "small" / "there"
    Results(there).collect(known)
    words = [str(tmp_path / "study.yaml"), "--runs", str(tmp_path / "none")]
    words += ["--data", str(tmp_path / "none")]
    with pytest.raises(UsageError, match="here: no run of study 'small' is over"):
        cli.main(["report", *words])
    assert f"note: runs.csv, curves.csv of {there}, another machine's" in capsys.readouterr().err
    assert cli.main(["report", *words, "--results", str(there)]) == 0
    assert cli.main(["report", *words, "--runs", str(tmp_path / "runs")]) == 0
    capsys.readouterr()
    assert cli.main(["status", *words]) == 0  # it has results of its own now
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("place", ["runs", "results"])
def test_a_study_that_changed_is_told_where_it_is_another(known: State, tmp_path: Path, place: str):
    pretend(known, loss_of)
    folder = {"runs": known.folder, "results": tmp_path / "results"}[place]
    begin(folder, description(known.study, known.systems, known.identity))
    tuning = {"seed": 2, "horizon": "50K", "lr": [0.5, 1, 2]}
    path = write_study(tmp_path, tuning=tuning)
    words = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    with pytest.raises(UsageError, match=f"since what is in {folder} was begun.*--results"):
        cli.main(["status", str(path), *words])


def test_new_runs_join_those_that_are_kept(known: State, tmp_path: Path):
    pretend(known, loss_of)
    Results(tmp_path / "results").collect(known)
    runs = pandas.read_csv(tmp_path / "results" / "runs.csv")
    half = runs[runs["phase"] == "tuning"]
    half.to_csv(tmp_path / "results" / "runs.csv", index=False)
    Results(tmp_path / "results").collect(known)
    again = pandas.read_csv(tmp_path / "results" / "runs.csv")
    assert list(again["key"]) == list(runs["key"])


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
    """Forget the runs of a system to a horizon, as if they were on their way."""
    for run in known.plan().runs:
        if (run.system, run.horizon) == (system, horizon) and run.seed in seeds:
            shutil.rmtree(known.folder_of(run))


def test_seeds_that_are_on_their_way_do_not_count_as_the_fast_ones(known: State, tmp_path: Path):
    """Two are not at the end: one is at the target already, and the other may take forever."""
    ahead = {11: 0.4, 12: 0.0, 13: 0.5}

    def loss(run: PlannedRun) -> float:
        is_subject = run.system == "smlp_deterministic"
        return loss_of(run) - ahead.get(run.seed, 0) * is_subject

    pretend(known, loss)
    without(known, "smlp_deterministic", seeds=(11, 12), horizon=400_000)
    claims, _ = claims_and_text(known, tmp_path)
    assert claims["C2"]["comparisons"][0]["found"]["n"] == 1
    assert "smlp_deterministic: seed 11, 12 is missing" in claims["C2"]["notes"]


def test_each_is_compared_with_each_by_its_cost(known: State, tmp_path: Path):
    """Losses are on straight lines between horizons, so that each share is one of small numbers."""
    behind = {"transformer": 0.3, "switch": 0.0, "smlp_deterministic": 0.075}

    def loss(run: PlannedRun) -> float:
        exact = 6.0 - 0.3 * math.log2((run.horizon or 10**5) / 10**5) + behind[run.system]
        return exact + 0.3 * ((run.system, run.seed) == ("transformer", 12))

    pretend(known, loss)
    made = page_of(known, tmp_path)
    tokens = [made.measured.tables.tokens(horizon) for horizon in known.study.horizons]
    costs = {(each.one, each.other): each for each in made.costs}
    assert len(costs) == 6
    # Switch is where sMLP ends three quarters of the way from the second horizon to the third.
    share = (tokens[1] + 3 * tokens[2]) / 4 / tokens[2]
    assert costs["switch", "smlp_deterministic"].found.mean == pytest.approx(share)
    assert costs["smlp_deterministic", "switch"].unreached == 3
    # Seed 12 of the Transformer ends where Switch begins, the others where it is at the second.
    bound = costs["switch", "transformer"]
    mean = (tokens[1] ** 2 * tokens[0]) ** (1 / 3) / tokens[2]
    assert (bound.found.mean, bound.is_bound) == (pytest.approx(mean), True)


def test_a_study_under_way_says_what_it_has(known: State, tmp_path: Path):
    """Switch has its first horizon alone, sMLP its trials, one seed of the Transformer no end."""
    pretend(known, loss_of)
    for horizon in (None, 100_000, 200_000, 400_000):
        without(known, "smlp_deterministic", seeds=(11, 12, 13), horizon=horizon)
        if horizon != 100_000:
            without(known, "switch", seeds=(11, 12, 13), horizon=horizon)
    without(known, "transformer", seeds=(13,), horizon=400_000)
    made = page_of(known, tmp_path)
    losses = made.text().partition("## Losses")[2]
    assert made.lacking == ["26 of 54 runs are over"]
    for name, seeds in (("switch", "0 to 3"), ("transformer", "2 to 3"), ("smlp_determin.*", 0)):
        assert re.search(rf"\| {name} \|.* \| {seeds} \|", losses)
    [legend] = drawing(made).evaluations().legends
    assert [label.get_text() for label in legend.get_texts()] == ["transformer"]


def test_a_horizon_that_diverged_leaves_a_bound(known: State, tmp_path: Path):
    """Where one seed of the subject diverged at the first horizon, and is there at the next."""

    def loss(run: PlannedRun) -> float:
        if run.system != "smlp_deterministic":
            return loss_of(run)
        bad = run.seed == 12 and run.horizon == 100_000
        return math.inf if bad else loss_of(run) - 0.5 * (run.horizon == 200_000)

    pretend(known, loss)
    claims, text = claims_and_text(known, tmp_path)
    [comparison] = claims["C2"]["comparisons"]
    assert comparison["found"]["n"] == 3
    assert 0.25 < comparison["found"]["mean"] < 0.55
    assert comparison["is_bound"]
    assert "nan" not in text


def test_curves_cross_by_the_seeds_that_both_have(tmp_path: Path):
    """Switch's one seed is its worst: against all seeds of the others' it would never cross."""
    seeds = {"switch": [13], "others": [11, 12, 13]}
    known = state_of(write_study(tmp_path, seeds=seeds), runs=tmp_path / "runs")
    late = {100_000: -0.1, 200_000: -0.05}

    def loss(run: PlannedRun) -> float:
        is_seed = 1.0 * (run.seed == 13)
        first = late.get(run.horizon or 0, 0.05) * (run.system == "switch")
        return 6.0 - 0.3 * math.log2((run.horizon or 10**5) / 10**5) + is_seed + first

    pretend(known, loss)
    made = page_of(known, tmp_path)
    tokens = [made.measured.tables.tokens(horizon) for horizon in (200_000, 400_000)]
    assert crossing(made.measured, "switch") == f"{sum(tokens) / 2e6:.3g}M"
    without(known, "smlp_deterministic", seeds=(13,), horizon=400_000)
    shutil.rmtree(tmp_path / "results")
    assert crossing(page_of(known, tmp_path).measured, "switch") == "unknown"


@pytest.mark.parametrize(("command", "what"), [("evaluate", "evaluation"), ("run", "speed")])
def test_two_do_not_evaluate_or_time_a_study_at_once(
    known: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, what: str
):
    """The second would overwrite the lines of the first, or disturb its timing."""
    pretend(known, loss_of)
    monkeypatch.setattr(StudyData, "contents", lambda _: {})
    monkeypatch.setattr(StudyData, "check_vocabulary", lambda *_: None)
    words = [str(tmp_path / "study.yaml"), "--runs", str(tmp_path / "runs")]
    words += ["--results", str(tmp_path / "results")]
    words += ["--speed"] if command == "run" else []
    lease = known.take(known.folder / what)
    assert lease is not None
    with lease, pytest.raises(UsageError, match=f"{what}: process .* is doing this"):
        cli.main([command, *words])


RESULTS = REPOSITORY / "studies" / "results"
FOLDERS = [path.relative_to(RESULTS).as_posix() for path in sorted(RESULTS.glob("*/*"))]


@pytest.mark.parametrize("name", slow_unless_in(("rope/intel-xeon", "long/amd-epyc"), FOLDERS))
def test_a_kept_report_is_that_of_its_csv_files(name: str, tmp_path: Path):
    """With the study's file, which is what it was begun as: `tools/study.py report` writes it."""
    folder = RESULTS / name
    study = REPOSITORY / "studies" / f"{folder.parent.name}.yaml"
    words = ["report", str(study), "--runs", str(tmp_path), "--results", str(folder)]
    pages = []
    for known, results in cli.read_states(cli.build_parser().parse_args(words)):
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
    """studies/both_rules.py prints what the page has."""
    path = REPOSITORY / "studies" / "both_rules.py"
    spec = importlib.util.spec_from_file_location("both_rules", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (REPOSITORY / "docs" / "study-results.md").read_text(encoding="utf-8")
    assert "\n".join(module.lines()) in page
