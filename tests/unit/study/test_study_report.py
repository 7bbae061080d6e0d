"""Results and reports, on runs that were never trained."""

import argparse
import dataclasses
import itertools
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas
import pytest
import torch
import yaml
from support.launches import REPOSITORY
from support.studies import pretend, state_of, write_study

from megatron_smlp.errors import UsageError
from megatron_smlp.study import cli, gemm, leases, short, speed
from megatron_smlp.study import hardware as hardware_module
from megatron_smlp.study import results as results_module
from megatron_smlp.study import state as state_module
from megatron_smlp.study.data import StudyData
from megatron_smlp.study.figures import ALWAYS_ALIKE, Drawing, _looks, speedup
from megatron_smlp.study.final import what_is_missing
from megatron_smlp.study.hardware import hardware
from megatron_smlp.study.metrics import VALIDATION_LOSS
from megatron_smlp.study.plan import PlannedRun
from megatron_smlp.study.report import Page
from megatron_smlp.study.results import Results
from megatron_smlp.study.state import State, begin, description

NOISE = {11: -0.002, 12: 0.003, 13: 0.0}


def loss_of(run: PlannedRun) -> float:
    """0.05 nats under the others for sMLP, with seeds that differ by less."""
    ahead = 0.05 if run.system == "smlp_deterministic" else 0.0
    wobble = NOISE.get(run.seed, 0.0) * {"switch": 1, "transformer": 0.5}.get(run.system, -1)
    return 6.0 - 0.3 * math.log2((run.horizon or 10**5) / 10**5) - ahead + wobble


@pytest.fixture
def known(tmp_path: Path) -> State:
    tuning = {"seed": 1, "horizon": "50K", "lr": [0.5, 1, 2]}
    return state_of(write_study(tmp_path, tuning=tuning), runs=tmp_path / "runs")


def made_of(known: State, folder: Path) -> Page:
    results = Results(folder / "results")
    results.collect(known)
    return Page(known, results)


def page(known: State, folder: Path) -> tuple[dict[str, dict], str]:
    """The claims, and report.md but for the figures."""
    made = made_of(known, folder)
    return {claim["name"]: claim for claim in json.loads(made.json())["claims"]}, made.text()


def drawing(made: Page) -> Drawing:
    return Drawing(made.study, made.systems, made.tables, made.plan.factors)


def claims_of(known: State, folder: Path) -> dict[str, dict]:
    return page(known, folder)[0]


def report(known: State, folder: Path) -> None:
    """Write the report by the command."""
    words = ["--runs", str(folder / "runs"), "--results", str(folder / "results")]
    words += ["--data", str(folder / "none")]  # not those of whoever runs studies here
    assert cli.main(["report", str(folder / "study.yaml"), *words]) == 0


def test_a_true_difference_is_confirmed(known: State, tmp_path: Path):
    pretend(known, loss_of)
    claims = claims_of(known, tmp_path)
    assert claims["C1"]["verdict"] == "confirmed"
    mean = claims["C1"]["comparisons"][0]["found"]["mean"]
    assert mean == pytest.approx(-0.05, abs=0.005)


def test_no_timing_leaves_time_undecided(known: State, tmp_path: Path):
    pretend(known, loss_of)
    claims = claims_of(known, tmp_path)
    assert (claims["C2"]["verdict"], claims["C3"]["verdict"]) == ("undecided", "undecided")
    # 0.3 nats a doubling, 0.05 ahead: between 200K and 400K tokens, a sixth of them fewer.
    found = claims["C2"]["comparisons"][0]["found"]["mean"]
    assert found == pytest.approx(1 - 0.5 / 6, abs=0.01)


def timing(steps: dict[str, list[float]], gemm: list[float]) -> list[dict[str, object]]:
    """Lines of speed.csv, of each system's seconds a step by round."""
    return [
        {"system": name, "round": number, "seconds_per_iteration": step,
         "tokens_per_second": 2048 / step, "tflops": 0.1, "gemm_tflops": gemm[number],
         "processes": 1, "threads": 1, "steps": 40}
        for name, own in steps.items()
        for number, step in enumerate(own)
    ]  # fmt: skip


def test_time_is_tokens_times_step_time(known: State, tmp_path: Path):
    pretend(known, loss_of)
    slow, fast = [1.01, 1.02, 1.03], [0.51, 0.5, 0.52]
    steps = {"transformer": slow, "switch": slow, "smlp_deterministic": fast}
    Results(tmp_path / "results").add_speed(timing(steps, [0.4] * 3))
    claims, text = page(known, tmp_path)
    assert (claims["C2"]["verdict"], claims["C3"]["verdict"]) == ("confirmed", "confirmed")
    costs = known.systems["smlp_deterministic"].costs
    numbers = [f"{costs[name]:,}" for name in ("total_parameters", "active_parameters")]
    forward = ("forward_tflops_per_1024_tokens", "forward_needed_tflops_per_1024_tokens")
    numbers += [f"{costs[name]:.5f}" for name in forward]
    # Half of 2e-3; 2048 tokens in 0.51 s; 0.1 of 0.4 TFLOP/s; what `pretend` logs.
    numbers += ["0.001 (edge)", "4,016", "25%", "5,000", "BASE: greedy, nothing is dropped"]
    assert f"| smlp_deterministic | {' | '.join(numbers)} |" in text
    assert f"Quiet timing, and all times from it, are of {hardware()}, " in text
    assert claims["C2"]["comparisons"][0]["found"]["mean"] == pytest.approx(0.458, abs=0.01)


def test_the_machines_of_the_runs_are_told(
    known: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A machine that collects another's runs does not take them for its own."""
    folder = tmp_path / "results"
    folder.mkdir()
    monkeypatch.setattr(state_module, "hardware", lambda: "one")
    pretend(known, loss_of)
    monkeypatch.setattr(state_module, "hardware", lambda: "another")
    runs = known.plan().runs
    known.end(runs[-1], status=state_module.DONE, loss=str(loss_of(runs[-1])), attempts=1)
    _, text = page(known, tmp_path)
    told = f"The runs were trained on another (1) and one ({len(runs) - 1}): repeated on the"
    assert told in text
    kept = Results(folder).runs
    kept.drop(columns="hardware").to_csv(folder / "runs.csv", index=False)  # as it was once
    assert "were trained on" not in page(known, tmp_path)[1]


def test_a_time_is_as_uncertain_as_its_timing(known: State, tmp_path: Path):
    """The seeds need a sixth fewer tokens, nearly alike; the rounds are far apart."""
    pretend(known, loss_of)
    others = [1.0] * 4
    steps = {"transformer": others, "switch": others, "smlp_deterministic": [0.7, 1.1, 0.75, 1.2]}
    Results(tmp_path / "results").add_speed(timing(steps, [0.4] * 4))
    claims = claims_of(known, tmp_path)
    found = claims["C2"]["comparisons"][0]["found"]
    assert found["low"] < 0.75
    assert found["high"] > 1
    assert claims["C2"]["verdict"] == "undecided"


def test_rounds_with_a_slow_product_do_not_count(known: State, tmp_path: Path):
    pretend(known, loss_of)
    others = [1.0, 9.0, 1.0, 1.0]
    steps = {"transformer": others, "switch": others, "smlp_deterministic": [0.5] * 4}
    # More than half of them slow, so that the median would be.
    Results(tmp_path / "results").add_speed(timing(steps, [0.4, 0.2, 0.4, 0.41]))
    claims, text = page(known, tmp_path)
    found = claims["C3"]["comparisons"][0]["found"]
    assert (found["mean"], found["n"]) == (pytest.approx(0.5), 3)
    assert "Of 12 timings 3 are left out: that product, just before, had less than 75%" in text
    assert f"are of {hardware()}, 1 thread a process." in text


def test_what_was_looked_at_is_not_looked_at_again(tmp_path: Path):
    """Tasks may be added to checkpoints whose text is known, and the other way round."""
    results = Results(tmp_path)
    lines = [("text", "routing", "greedy"), ("text", "position", "0"), ("tasks", "task", "copa")]
    for key, kind, label in lines:
        one = {"key": key, "system": "gmlp", "seed": 1, "kind": kind, "label": label, "value": 1.0}
        results.add_evaluations([one])
    tasks = ["copa", "piqa"]
    assert what_is_missing(results.evaluations, "text", ()) == (False, [])
    assert what_is_missing(results.evaluations, "text", tasks) == (False, tasks)
    assert what_is_missing(results.evaluations, "tasks", tasks) == (True, ["piqa"])
    assert what_is_missing(results.evaluations, "neither", tasks) == (True, tasks)
    results.add_evaluations([one | {"value": 0.5}])  # as of a group of tasks that is asked again
    assert list(results.evaluations["value"]) == [1.0, 1.0, 0.5]


def test_a_task_is_scored_as_a_whole(tmp_path: Path):
    """A part of its examples would be kept as its score, beside whole ones of other systems."""
    words = ["evaluate", str(write_study(tmp_path)), "--tasks", "copa"]
    with pytest.raises(UsageError, match="--limit"):
        cli.build_parser().parse_args([*words, "--limit", "5"])


def test_what_final_checkpoints_were_found_to_do(known: State, tmp_path: Path):
    """C4 by hand: two tasks, right answers 3 % more often, with seeds that differ by less."""
    pretend(known, loss_of)
    results = Results(tmp_path / "results")
    results.collect(known)
    ahead = {"smlp_deterministic": 0.03}
    finals = results.runs[results.runs["horizon"] == known.study.longest]
    keys = {(run.system, run.seed): run.key for run in finals.itertuples()}
    for name in known.systems:
        for seed, wobble in NOISE.items():
            right = 0.5 + ahead.get(name, 0.0) + wobble
            common = {"key": keys[name, seed], "system": name, "seed": seed, "stderr": 0.01}
            numbers = [
                ("task", "copa", right), ("task", "piqa", right + 0.1), ("repeat", "new", 6.0),
                ("repeat", "after 3+", 2.0 - right), ("position", "0", 7.0),
            ]  # fmt: skip
            results.add_evaluations([
                common | {"kind": kind, "label": label, "value": value, "count": 100}
                for kind, label, value in numbers
            ])  # fmt: skip
    report(known, tmp_path)
    claims, text = page(known, tmp_path)
    assert claims["C4"]["verdict"] == "confirmed"
    [comparison] = claims["C4"]["comparisons"]
    assert comparison["other"] == "switch"
    assert comparison["found"]["mean"] == pytest.approx(-3.0)
    assert "| smlp_deterministic | 53.0 ± 1.0 | 63.0 ± 1.0 |" in text
    assert "| chance | 50 | 50 |" in text
    assert "| paper: Switch 9B | 75.0 | n/a |" in text
    assert "| repeat | new | after 3+ | seeds |\n| --- | --- | --- | --- |\n" in text
    assert "| smlp_deterministic | 6 | 1.47 |" in text
    assert (tmp_path / "results" / "where-the-loss-lies.png").stat().st_size > 10_000


def test_few_questions_decide_nothing_however_the_seeds_agree(known: State, tmp_path: Path):
    """Five more of a hundred are right, and three seeds agree: by the questions it is luck."""
    pretend(known, loss_of)
    ahead = {"smlp_deterministic": 0.05}
    Results(tmp_path / "results").add_evaluations([
        {"key": run.key, "system": run.system, "seed": run.seed, "kind": "task", "label": "copa",
         "value": 0.55 + ahead.get(run.system, 0.0) + NOISE[run.seed], "stderr": 0.05}
        for run in known.plan().runs
        if run.horizon == known.study.longest
    ])  # fmt: skip
    claims, _ = page(known, tmp_path)
    [comparison] = claims["C4"]["comparisons"]
    assert comparison["found"]["mean"] == pytest.approx(-5)
    half = 1.96 * 5 * 2**0.5
    assert comparison["found"]["high"] == pytest.approx(-5 + half, rel=0.01)
    assert claims["C4"]["verdict"] == "undecided"


def test_a_rival_that_was_not_scored_leaves_tasks_undecided(tmp_path: Path):
    """GShard's scores are lower by far, and those of Switch, HASH and one of BASE are not there."""
    systems = ["switch", "gshard", "base", "hash", "smlp_deterministic"]
    known = state_of(write_study(tmp_path, systems=systems), runs=tmp_path / "runs")
    pretend(known, loss_of)
    tasks = {
        "smlp_deterministic": ["copa", "piqa"], "gshard": ["copa"], "base": ["copa", "piqa"],
    }  # fmt: skip
    Results(tmp_path / "results").add_evaluations([
        {"key": run.key, "system": run.system, "seed": run.seed, "kind": "task", "label": task,
         "value": 0.5 + NOISE[run.seed] + (task == "piqa") * 0.2
         + (run.system == "smlp_deterministic") * (0.1 + 2 * NOISE[run.seed])}
        for run in known.plan().runs
        for task in tasks.get(run.system, ())
        if run.horizon == known.study.longest and (run.system, run.seed) != ("base", 12)
    ])  # fmt: skip
    claims, text = page(known, tmp_path)
    found = {each["other"]: each["found"] for each in claims["C4"]["comparisons"]}
    counts = {name: each["n"] for name, each in found.items()}
    assert counts == {"switch": 0, "gshard": 3, "base": 2, "hash": 0}
    assert found["gshard"]["mean"] == pytest.approx(-10, abs=0.1)  # by the task that both have
    assert claims["C4"]["verdict"] == "undecided"
    assert claims["C4"]["notes"] == [
        "of copa, piqa",
        "switch: seed 11, 12, 13 lacks copa, piqa",
        "gshard: seed 11, 12, 13 lacks piqa",
        "base: seed 12 lacks copa, piqa",
        "hash: seed 11, 12, 13 lacks copa, piqa",
    ]
    assert "gshard: seed 11, 12, 13 lacks piqa" in text


def test_runs_of_a_rate_that_is_no_longer_best_do_not_count(known: State, tmp_path: Path):
    pretend(known, loss_of)
    before = claims_of(known, tmp_path)
    path = tmp_path / "results" / "runs.csv"
    runs = pandas.read_csv(path)
    other = runs[(runs["phase"] == "main") & (runs["system"] == "switch")].copy()
    other["key"] = "0" + other["key"].str[1:]
    other["validation_loss"] = 1.0
    pandas.concat([runs, other]).to_csv(path, index=False)
    assert claims_of(known, tmp_path) == before


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
    claims, text = page(known, tmp_path)
    assert claims["C1"]["notes"] == [
        "transformer: seed 13 is missing",
        "switch: seed 12 diverged",
    ]
    assert claims["C1"]["verdict"] == "undecided"
    assert "diverged (1 of 3)" in text


def test_one_seed_is_undecided(tmp_path: Path):
    known = state_of(write_study(tmp_path, seeds=[11]), runs=tmp_path / "runs")
    pretend(known, loss_of)
    claims = claims_of(known, tmp_path)
    assert claims["C1"]["verdict"] == "undecided"
    assert claims["C1"]["comparisons"][0]["found"]["visible"] == "inf"


def test_trials_alone_are_reported(known: State, tmp_path: Path):
    """A study that has begun: there is nothing yet to draw against tokens."""
    pretend(known, loss_of)
    for run in known.plan().runs:
        if run.phase == "main":
            shutil.rmtree(known.folder_of(run))
    claims, _ = page(known, tmp_path)
    assert claims["C1"]["verdict"] == "undecided"
    report(known, tmp_path)
    assert [path.stem for path in (tmp_path / "results").glob("*.png")] == ["learning-rates"]


def test_nothing_to_report(known: State, tmp_path: Path):
    with pytest.raises(UsageError, match="no run of study 'small' is over"):
        report(known, tmp_path)


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


def test_a_curve_that_is_not_whole_is_not_called_a_miss(known: State, tmp_path: Path):
    def loss(run: PlannedRun) -> float:
        return loss_of(run) + (0.2 if run.system == "smlp_deterministic" else 0.0)

    pretend(known, loss)
    for run in known.plan().runs:
        if run.system == "smlp_deterministic" and run.horizon == 400000 and run.seed == 12:
            shutil.rmtree(known.folder_of(run))
    found = claims_of(known, tmp_path)["C2"]["comparisons"][0]["found"]
    assert (found["n"], found["mean"]) == (2, "inf")


def without(known: State, system: str, *, seeds: tuple[int, ...], horizon: int) -> None:
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
    claims, _ = page(known, tmp_path)
    assert claims["C2"]["comparisons"][0]["found"]["n"] == 1
    assert "smlp_deterministic: seed 11, 12 is missing" in claims["C2"]["notes"]


def test_of_how_many_seeds_a_loss_is_not_reached_is_said(known: State, tmp_path: Path):
    """One seed of three never comes to Switch's loss; all come to the Transformer's."""

    def loss(run: PlannedRun) -> float:
        is_slow = (run.system, run.seed) == ("smlp_deterministic", 12)
        return loss_of(run) + 0.1 * is_slow + 0.2 * (run.system == "transformer")

    pretend(known, loss)
    made = made_of(known, tmp_path)
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


def test_each_is_compared_with_each_by_its_cost(known: State, tmp_path: Path):
    """Losses are on straight lines between horizons, so that each share is one of small numbers."""
    behind = {"transformer": 0.3, "switch": 0.0, "smlp_deterministic": 0.075}

    def loss(run: PlannedRun) -> float:
        exact = 6.0 - 0.3 * math.log2((run.horizon or 10**5) / 10**5) + behind[run.system]
        return exact + 0.3 * ((run.system, run.seed) == ("transformer", 12))

    pretend(known, loss)
    made = made_of(known, tmp_path)
    table = made.text().split("## From each to each other's loss")[1].split("\n## ")[0]
    assert "over what that one needed, in tokens" in table
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines() if row]
    # To the Transformer's losses Switch needs the tokens of the second horizon, and of seed 12,
    # which ends where Switch begins, at most those of the first; sMLP a quarter of the way more.
    # Switch is where sMLP ends three quarters of the way from the second horizon to the third.
    first, second, third = (made.tables.tokens(horizon) for horizon in known.study.horizons)
    further, later = first + (second - first) / 4, second + (third - second) / 4
    assert cells[-3:] == [
        ["transformer", "", "never", "never"],
        ["switch", f"≤ {(second**2 * first) ** (1 / 3) / third:.3f}", "",
         f"**{(second + 3 * third) / 4 / third:.3f}**"],
        ["smlp_deterministic", f"{(later**2 * further) ** (1 / 3) / third:.3f}", "never", ""],
    ]  # fmt: skip
    found = {(each["one"], each["other"]): each for each in json.loads(made.json())["costs"]}
    assert len(found) == 6
    assert found["smlp_deterministic", "switch"]["unreached"] == 3


def test_a_study_under_way_says_what_it_has(known: State, tmp_path: Path):
    """Switch has its first horizon alone, sMLP its trials, one seed of the Transformer no end."""
    pretend(known, loss_of)
    for run in known.plan().runs:
        is_main = run.phase == "main"
        if (run.system == "switch" and is_main and run.horizon != 100_000) or (
            run.system == "smlp_deterministic" and is_main
        ):
            shutil.rmtree(known.folder_of(run))
    without(known, "transformer", seeds=(13,), horizon=400_000)
    made = made_of(known, tmp_path)
    text = made.text()
    losses = text.partition("## Losses")[2]
    assert "**Not whole**: 26 of 54 runs are over.\n" in text
    assert re.search(r"\| switch \| 6\.\d+ ± 0\.\d+ \| missing \| missing \| 0 to 3 \|", losses)
    assert re.search(r"\| transformer \|.* \| 2 to 3 \|", losses)
    assert re.search(r"\| smlp_deterministic \|( missing \|){3} 0 \|", losses)
    assert text.count("| 0.001 (edge) |") == len(known.systems)
    figure = drawing(made).evaluations()
    labels = [label.get_text() for label in figure.legends[0].get_texts()]
    assert labels == ["transformer"]


def test_a_horizon_that_diverged_leaves_a_bound(known: State, tmp_path: Path):
    """Where one seed of the subject diverged at the first horizon, and is there at the next."""

    def loss(run: PlannedRun) -> float:
        if run.system != "smlp_deterministic":
            return loss_of(run)
        bad = run.seed == 12 and run.horizon == 100_000
        return math.inf if bad else loss_of(run) - 0.5 * (run.horizon == 200_000)

    pretend(known, loss)
    claims, text = page(known, tmp_path)
    [comparison] = claims["C2"]["comparisons"]
    assert comparison["found"]["n"] == 3
    assert 0.25 < comparison["found"]["mean"] < 0.55
    assert comparison["is_bound"]
    assert "nan" not in text


def test_one_lucky_seed_is_not_the_best_system(tmp_path: Path):
    systems = ["switch", "hash", "smlp_deterministic"]
    seeds = {"switch": [11], "others": [11, 12, 13]}
    path = write_study(tmp_path, systems=systems, seeds=seeds)
    known = state_of(path, runs=tmp_path / "runs")
    pretend(known, lambda run: loss_of(run) - 0.1 * (run.system == "switch"))
    claims, _ = page(known, tmp_path)
    [comparison] = claims["C2"]["comparisons"]
    assert (comparison["other"], comparison["found"]["n"]) == ("hash", 3)


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
    made = made_of(known, tmp_path)
    tokens = [made.tables.tokens(horizon) for horizon in (200_000, 400_000)]
    assert made._crossing("switch") == f"{sum(tokens) / 2e6:.3g}M"
    without(known, "smlp_deterministic", seeds=(13,), horizon=400_000)
    shutil.rmtree(tmp_path / "results")
    assert made_of(known, tmp_path)._crossing("switch") == "unknown"


def test_the_noise_of_evaluations_is_of_the_loss_of_its_row(tmp_path: Path):
    systems = ["transformer", "smlp_deterministic", "smlp_partial"]
    known = state_of(write_study(tmp_path, systems=systems), runs=tmp_path / "runs")
    pretend(known, loss_of)
    made = made_of(known, tmp_path)
    curves = made.tables.curves[made.tables.curves[VALIDATION_LOSS].notna()]
    flips = 1.0 - 2.0 * (curves["iteration"] // 10 % 2)
    made.tables = dataclasses.replace(
        made.tables, curves=curves.assign(
            validation_loss=4.0 + 0.1 * flips, validation_suffix_loss=4.0 + 0.01 * flips
        ),
    )  # fmt: skip
    noise = {line.split(" | ")[0]: line.split(" | ")[-1] for line in made._losses()}
    assert noise["| smlp_deterministic"] == "0.117 |"  # six points, less a line: sqrt(5.49 / 4)
    assert noise["| smlp_partial (behind the prefix)"] == "0.0117 |"


def test_at_the_first_horizon_it_is_a_bound(known: State, tmp_path: Path):
    ahead = {"smlp_deterministic": 2.0}
    pretend(known, lambda run: loss_of(run) - ahead.get(run.system, 0.0))
    _, text = page(known, tmp_path)
    assert "| switch | ≥ 3.9 |" in text  # 195 iterations against 50, by 5 of which is evaluated


def test_costs_are_the_tokens_of_the_runs(known: State, tmp_path: Path):
    """A horizon ends at the evaluation that is nearest to it: after 50, 100, 195 iterations."""
    pretend(known, loss_of)
    made = made_of(known, tmp_path)
    tokens, _ = made.tables.curve("switch", 11, VALIDATION_LOSS)
    planned = [run for run in known.plan().runs if (run.system, run.seed) == ("switch", 11)]
    assert tokens == [2048 * run.end for run in planned if run.horizon]
    assert tokens != list(known.study.horizons)
    panel = drawing(made).losses(VALIDATION_LOSS, "").axes[0]
    assert list(panel.lines[0].get_xdata() * 1e3) == pytest.approx(tokens)
    assert made.tables.tokens(known.study.longest) == tokens[-1]


@pytest.mark.parametrize(("step", "ended"), [(1.3, "undecided"), (0.7, "confirmed")])
def test_a_bound_confirms_and_never_refutes(tmp_path: Path, step: float, ended: str):
    """At one horizon the step time is all that is known; tokens would have been fewer."""
    known = state_of(write_study(tmp_path, horizons=["200K"]), runs=tmp_path / "runs")
    pretend(known, loss_of)
    others = [1.01, 1.0, 1.02]
    steps = {
        "transformer": others, "switch": others, "smlp_deterministic": [step * x for x in others],
    }  # fmt: skip
    Results(tmp_path / "results").add_speed(timing(steps, [0.4] * 3))
    claims, _ = page(known, tmp_path)
    [comparison] = claims["C2"]["comparisons"]
    assert claims["C2"]["verdict"] == comparison["verdict"] == ended
    assert comparison["is_bound"]
    assert comparison["found"]["low"] == 0
    assert comparison["found"]["high"] == pytest.approx(step, rel=0.05)


def test_a_timing_that_is_stopped_keeps_its_rounds(
    known: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    timings = itertools.count(1)

    def timed(*_: object, **__: object) -> dict[str, float]:
        if next(timings) > 2 * len(known.systems) - 1:
            raise KeyboardInterrupt
        return {"seconds_per_iteration": 1.0, "tokens_per_second": 2048.0, "tflops": 0.1}

    monkeypatch.setattr(speed, "_time", timed)
    monkeypatch.setattr(speed, "_product", lambda _: {"gemm_tflops": 0.4, "threads": 3})
    args = argparse.Namespace(data=tmp_path, processes=2)
    with pytest.raises(KeyboardInterrupt):
        cli._time(args, known, Results(tmp_path / "results"))
    kept = Results(tmp_path / "results").speed
    assert (set(kept["processes"]), set(kept["threads"])) == ({2}, {3})
    assert set(kept["steps"]) == {known.study.speed.steps}
    assert list(kept["round"]) == [1] * len(known.systems)
    assert set(kept["system"]) == set(known.systems)


def test_a_timing_beside_a_worker_is_warned_of(
    known: State, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """Of the study or another one beside it; on another machine it disturbs nothing."""
    monkeypatch.setattr(speed, "_product", lambda _: {"gemm_tflops": 0.4, "threads": 1})
    monkeypatch.setattr(speed, "_time", lambda *_, **__: {"seconds_per_iteration": 1.0})
    run = known.folder.parent / "other" / "gmlp" / "lr1" / "11-0"
    timings = speed.time_systems(known, StudyData(known.folder), processes=1)
    lease = leases.take(run)
    assert lease is not None
    with lease:
        next(timings)
        words = f"warning: round 1 of 5: the machine is not quiet, workers train {run}\n"
        assert words in capsys.readouterr().err
        with monkeypatch.context() as patch:
            patch.setattr("socket.gethostname", lambda: "elsewhere")
            next(timings)
        assert "quiet" not in capsys.readouterr().err
    next(timings)
    assert "quiet" not in capsys.readouterr().err


def test_a_repeated_timing_adds_rounds(tmp_path: Path):
    """To those of the same machine; another one's are gone."""

    def time(step: float, *, rounds: int) -> None:
        results = Results(tmp_path)
        for count in range(1, rounds + 1):  # round by round, as the command writes them
            lines = timing({"switch": [step] * count}, [0.4] * count)
            results.add_speed([line | {"round": line["round"] + 1} for line in lines])

    time(3.0, rounds=2)
    Results(tmp_path).speed.assign(hardware="another").to_csv(tmp_path / "speed.csv", index=False)
    time(1.0, rounds=3)
    time(2.0, rounds=2)
    found = Results(tmp_path).speed
    assert list(found["round"]) == [1, 2, 3, 4, 5]
    assert list(found["seconds_per_iteration"]) == [1.0, 1.0, 1.0, 2.0, 2.0]
    assert set(found["hardware"]) == {hardware()}


@pytest.mark.parametrize(
    "changed", [{"processes": 2}, {"threads": 2}, {"steps": 20}, {"hardware": "another"}]
)
def test_rounds_of_another_kind_are_not_put_together(tmp_path: Path, changed: dict[str, Any]):
    Results(tmp_path).add_speed(timing({"switch": [3.0, 3.0]}, [0.4] * 2))
    Results(tmp_path).speed.assign(**changed).to_csv(tmp_path / "speed.csv", index=False)
    Results(tmp_path).add_speed(timing({"switch": [1.0]}, [0.4]))
    assert list(Results(tmp_path).speed["seconds_per_iteration"]) == [1.0]


def test_rounds_of_earlier_versions_join_those_of_one_process(tmp_path: Path):
    Results(tmp_path).add_speed(timing({"switch": [3.0, 3.0]}, [0.4] * 2))
    before = Results(tmp_path).speed.drop(columns=["processes", "threads", "steps"])
    before.to_csv(tmp_path / "speed.csv", index=False)
    assert len(Results(tmp_path).speed) == 2
    Results(tmp_path).add_speed(timing({"switch": [1.0]}, [0.4]))
    assert list(Results(tmp_path).speed["seconds_per_iteration"]) == [3.0, 3.0, 1.0]
    assert set(Results(tmp_path).speed["processes"]) == {1}
    assert set(Results(tmp_path).speed["threads"]) == {1}


@pytest.mark.parametrize(
    ("visible", "name"),
    [(None, "-2x-nvidia-h100-80gb-hbm3"), ("1", "-1x-nvidia-h100-80gb-hbm3"), ("", "")],
)
def test_a_machine_is_named_by_its_gpus_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, name: str
):
    """Two machines of one processor and other GPUs do not share a folder."""
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\nprintf 'NVIDIA H100 80GB HBM3\\nNVIDIA H100 80GB HBM3\\n'\n")
    driver.chmod(0o755)
    monkeypatch.setattr(hardware_module, "_cpuinfo", lambda: "model name\t: AMD EPYC 7B13\n")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert hardware.__wrapped__() == f"amd-epyc-7b13{name}"
    driver.unlink()
    assert hardware.__wrapped__() == "amd-epyc-7b13"


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
    lease = leases.take(known.folder / what)
    assert lease is not None
    with lease, pytest.raises(UsageError, match=f"{what}: another process is doing this"):
        cli.main([command, *words])


@pytest.mark.parametrize(("rounds", "is_said"), [(3, True), (5, False)])
def test_a_timing_that_was_ended_is_said(known: State, tmp_path: Path, rounds: int, is_said: bool):
    pretend(known, loss_of)
    steps = dict.fromkeys(known.systems, [1.0] * rounds)
    Results(tmp_path / "results").add_speed(timing(steps, [0.3, *[0.4] * (rounds - 1)]))
    _, text = page(known, tmp_path)
    assert ("The timing was ended after 3 of 5 rounds." in text) is is_said


def test_a_rate_at_the_edge_of_the_trials_is_said(tmp_path: Path):
    tuning = {"seed": 1, "horizon": "50K", "lr": [0.5, 1, 2]}
    known = state_of(write_study(tmp_path, tuning=tuning), runs=tmp_path / "runs")
    best = {"switch": 0.1}  # of the others, the middle one is
    pretend(known, lambda run: loss_of(run) + abs(run.factor - best.get(run.system, 1.0)))
    _, text = page(known, tmp_path)
    assert known.plan().at_edge == ["switch"]
    assert "| 0.001 (edge) |" in text
    assert "Edge: the best rate of switch is the lowest or highest that was tried" in text


def test_rows_say_of_how_many_seeds_and_of_which_positions_they_are(tmp_path: Path):
    systems = ["transformer", "smlp_deterministic", "smlp_partial"]
    known = state_of(write_study(tmp_path, systems=systems), runs=tmp_path / "runs")
    pretend(known, loss_of)
    lacking = {("transformer", 12), ("smlp_partial", 11), ("smlp_partial", 12)}
    Results(tmp_path / "results").add_evaluations([
        {"key": run.key, "system": run.system, "seed": run.seed, "kind": kind, "label": label,
         "value": 0.5, "stderr": 0.01}
        for run in known.plan().runs
        for kind, label in (("task", "copa"), ("task", "piqa"), ("repeat", "new"),
                            ("routing", "greedy"), ("routing", "prices"))
        if run.horizon == known.study.longest and (run.system, run.seed) not in lacking
        and (run.system, run.seed, label) != ("smlp_deterministic", 13, "piqa")
        and (run.system, label) != ("transformer", "prices")
    ])  # fmt: skip
    text = page(known, tmp_path)[1]
    assert "| transformer | 50.0 ± 1.0 | 50.0 ± 1.0 | 2 |" in text
    assert "| smlp_deterministic | 50.0 ± 1.0 | 50.0 ± 1.0 | 2 to 3 |" in text
    assert "| smlp_partial (also in the prefix) | 50.0 ± 1.0 | 50.0 ± 1.0 | 1 |" in text
    assert "| smlp_partial (also in the prefix) | 0.5 | 1 |" in text
    assert "| smlp_deterministic | 0.5 | 0.5 | 3 |" in text


def test_that_each_part_helps_is_of_parts_alone(tmp_path: Path):
    """Both MoEs help; that one rule of the feature MoE is worse than the other refutes nothing."""
    systems = ["gmlp", "gmlp_token_moe", "smlp_deterministic", "smlp_partial"]
    no_features = {"from": "smlp_deterministic", "feature-router": "none", "num-feature-experts": 1}
    ablations = [
        ["smlp_deterministic", "gmlp_token_moe"], ["gmlp_token_moe", "gmlp"],
        ["smlp_deterministic", "smlp_partial"],
    ]  # fmt: skip
    path = write_study(
        tmp_path, systems=systems, ablations=ablations, variants={"gmlp_token_moe": no_features},
        **{"flops-tolerance": 0.1, "needed-flops-tolerance": 0.1},
    )  # fmt: skip
    known = state_of(path, runs=tmp_path / "runs")
    losses = dict(zip(systems, (5.0, 4.9, 4.8, 4.0), strict=True))
    pretend(known, lambda run: losses[run.system] + NOISE[run.seed] * (1 + len(run.system) / 40))
    made = made_of(known, tmp_path)
    [claim] = [claim for claim in made.claims if claim.name == "C5"]
    assert claim.verdict == "confirmed"
    assert [(each.one, each.other) for each in claim.comparisons] == [
        ("smlp_deterministic", "gmlp_token_moe"), ("gmlp_token_moe", "gmlp"),
    ]  # fmt: skip
    [other] = made.others.comparisons
    assert (other.other, other.verdict, made.others.verdict) == ("smlp_partial", "refuted", "")
    assert other.found.p == other.found.holm  # Holm's steps are over these alone
    assert "| other | loss behind the prefix: smlp_deterministic - smlp_partial |" in made.text()
    assert len(json.loads(made.json())["others"]) == 1


def test_a_timing_is_the_fastest_of_the_later_half(
    known: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Whatever the first steps take, and others for most of the time; an evaluation is no step."""
    steps = [1.0, 8.0, 7.0, 6.0, 1.5, 50.0, 1.2, 9.0, 1.3]

    def trained(command: list[str], *, folder: Path, **_: object) -> int:
        flags = yaml.safe_load((folder / "flags.yaml").read_text())
        assert flags["train-iters"] == known.study.speed.steps
        assert [name for name in flags if name.startswith("lr-")] == []
        lines = [
            {"iteration": number, "loss": 5.0, "seconds_per_iteration": step,
             "tokens_per_second": 100 / step, "tflops_per_device": 10 / step}
            for number, step in enumerate(steps)
        ]  # fmt: skip
        lines.append({"iteration": len(steps), "validation_loss": 5.0})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
        return 0

    monkeypatch.setattr(short, "run_command", trained)
    monkeypatch.setattr(StudyData, "flags", [])
    data, system = StudyData(tmp_path), known.systems["transformer"]
    found = speed._time(known, system, data, processes=1)
    expected = {"seconds_per_iteration": 1.2, "tokens_per_second": 100 / 1.2, "tflops": 10 / 1.2}
    assert found == pytest.approx(expected)
    monkeypatch.setattr(short, "run_command", lambda *_, **__: 1)
    with pytest.raises(UsageError, match=r"timing transformer failed \(1\)"):
        speed._time(known, system, data, processes=1)


def test_a_product_is_timed_in_tflops(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """2 * 64 ** 3 operations, in 2 s at the fastest."""
    seconds = itertools.chain.from_iterable((0.0, float(last)) for last in (9, 8, 2, 7, 6, 5, 4))
    monkeypatch.setattr(gemm, "SIZE", {"cpu": 64, "cuda": 64})
    monkeypatch.setattr(gemm, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    gemm.main("bfloat16")
    speed_of_it, threads = capsys.readouterr().out.split()
    assert float(speed_of_it) == pytest.approx(2 * 64**3 / 2 / 1e12)
    assert int(threads) == torch.get_num_threads()


def test_claims_are_those_that_the_systems_can_decide(tmp_path: Path):
    """Dense ones alone, and a subject that is no sMLP: it has no rival in itself."""
    path = write_study(
        tmp_path, systems=["transformer", "gmlp", "mixer"], subject="gmlp",
        ablations=[["gmlp", "mixer"], ["transformer", "mixer"]], **{"needed-flops-tolerance": 0.1},
    )  # fmt: skip
    known = state_of(path, runs=tmp_path / "runs")
    pretend(known, loss_of)
    claims, text = page(known, tmp_path)
    assert list(claims) == ["C1"]
    assert [each["other"] for each in claims["C1"]["comparisons"]] == ["transformer", "mixer"]
    for pair in ("gmlp - mixer", "transformer - mixer"):
        assert f"| other | loss: {pair} |" in text


def test_a_study_of_ablations_alone_claims_nothing_else(tmp_path: Path):
    path = write_study(
        tmp_path, systems=["gmlp", "mixer"], subject="gmlp", ablations=[["gmlp", "mixer"]],
        **{"needed-flops-tolerance": 0.1},
    )  # fmt: skip
    known = state_of(path, runs=tmp_path / "runs")
    pretend(known, loss_of)
    claims, text = page(known, tmp_path)
    assert claims == {}
    assert "None of the paper's is tested." in text
    assert "| other | loss: gmlp - mixer |" in text


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
    made = made_of(known, tmp_path)
    [panel] = drawing(made).breakdown(["position"]).axes
    drawn = [list(line.get_ydata()) for line in panel.lines]
    assert drawn == [pytest.approx([0.5, 0.5]), [0.0, 0.0]]


def test_one_horizon_is_drawn_system_by_system(tmp_path: Path):
    """A curve of one point would show neither seeds nor intervals."""
    path = write_study(tmp_path, horizons=["200K"], seeds=[11, 12, 13])
    known = state_of(path, runs=tmp_path / "runs")
    pretend(known, loss_of)
    made = made_of(known, tmp_path)
    [panel] = drawing(made).losses(VALIDATION_LOSS, "").axes
    assert [label.get_text() for label in panel.get_yticklabels()] == list(known.systems)
    dots, means, ends = panel.lines[:3]
    seeds = list(made.tables.losses("transformer", 200_000, VALIDATION_LOSS).values())
    assert list(dots.get_xdata()) == seeds
    assert means.get_xdata()[0] == pytest.approx(sum(seeds) / 3)
    assert ends.get_xdata()[0] < min(seeds) < max(seeds) < ends.get_xdata()[1]


def test_trials_by_the_loss_behind_the_prefix_say_so(tmp_path: Path):
    systems = ["transformer", "smlp_deterministic", "smlp_partial"]
    tuning = {"seed": 1, "horizon": "50K", "lr": [0.5, 1, 2]}
    path = write_study(tmp_path, systems=systems, tuning=tuning)
    known = state_of(path, runs=tmp_path / "runs")
    pretend(known, loss_of)
    made = made_of(known, tmp_path)
    figure = drawing(made).learning_rates()
    [legend] = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["transformer", "smlp_deterministic", "smlp_partial (behind the prefix)"]


def rings(made: Page) -> list[tuple[float, float]]:
    [panel] = drawing(made).learning_rates().axes
    lines = (line for line in panel.lines if line.get_fillstyle() == "none")
    return [(x, y) for line in lines for x, y in zip(*line.get_data(), strict=True)]


def test_a_ring_is_around_a_rate_that_was_chosen(known: State, tmp_path: Path):
    """Two systems' trials are over and the third's are not: none is chosen yet."""
    pretend(known, lambda run: loss_of(run) + abs(run.factor - 1))
    made = made_of(known, tmp_path)
    rates = [made.systems[name].flags["lr"] for name in made.systems]
    assert [x for x, _ in rings(made)] == pytest.approx(rates)
    for run in known.plan().runs:
        if run.phase == "main" or (run.system == "switch" and run.factor == 2):
            shutil.rmtree(known.folder_of(run), ignore_errors=True)
    shutil.rmtree(tmp_path / "results")
    assert rings(made_of(known, tmp_path)) == []


FOLDERS = sorted((REPOSITORY / "studies" / "results").glob("*/*"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.parent.name)
def test_a_kept_report_is_that_of_its_csv_files(folder: Path, tmp_path: Path):
    """With the study's file, which is what it was begun as: `tools/study.py report` writes it."""
    study = REPOSITORY / "studies" / f"{folder.parent.name}.yaml"
    words = ["report", str(study), "--runs", str(tmp_path), "--results", str(folder)]
    known, results = cli.read_state(cli.build_parser().parse_args(words))
    made = Page(known, results)
    kept = (folder / "report.md").read_text(encoding="utf-8")
    made.figures = [name for name in re.findall(r"!\[(.+)\]", kept) if (folder / name).exists()]
    assert made.text() == kept
    assert made.json() == (folder / "report.json").read_text(encoding="utf-8")
