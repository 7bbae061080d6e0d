"""`make first-gpu` on the CPU in place of a GPU: its cases run, and no failure stops the others."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cover import selected, slow_unless_in
from support.first_gpu import __main__ as program
from support.first_gpu import running
from support.first_gpu.__main__ import chosen, options_of
from support.first_gpu.cases import CASES, Case
from support.first_gpu.launched import KERNELS, check_launches
from support.first_gpu.model_cases import LAYOUTS, estimated_memory, trains
from support.first_gpu.notes import Notes, Place
from support.first_gpu.reference import (
    Reference,
    Run,
    compare,
    distances,
    reference,
    unless_by_chance,
)
from support.first_gpu.report import Report
from support.first_gpu.running import run_case
from support.first_gpu.sabotage import SABOTAGES, VARIABLE
from support.first_gpu.training import NUM_STEPS, WAIT, run_flags
from support.launches import REPOSITORY, TIME_LIMIT, Step, clean_environment
from support.systems import SYSTEMS

from megatron_smlp.provenance import made_by
from megatron_smlp.training.agreement import StepAgreement

FOR_CUDA = {"environment", "fp16", "transformer_engine", "cuda_graphs"}
"""Cases that are meaningless on a CPU."""


def command(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "support.first_gpu", *flags],
        cwd=REPOSITORY,
        env=clean_environment(PYTHONPATH="tests:."),
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT,
        check=False,
    )


# One launch per group, so that no single wait is long on a shared machine.
GROUPS = (
    "reference_,train_,text,tp2,pp2,ep2,dp2,ep8,environment,operators,kernels,kernel_times,size_,"
    "recompute,dropout,async_save,fp16,transformer_engine,cuda_graphs",
    "evaluate,generate,convert,exported,serve",
)


def _is_of(name: str, group: str) -> bool:
    return any(part in name for part in group.split(","))


# Other tests cover systems and layouts; this one, that a case of each kind runs and is reported.
FAST = """
    environment reference_smlp_deterministic train_smlp_deterministic operators kernel_times fp16
    text reference_layouts dp2
"""


@pytest.fixture(scope="module")
def reports(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Any]]:
    """Map a case's name to the JSON report of its group, with the printed report added."""
    folder: Path = tmp_path_factory.mktemp("first_gpu")

    @functools.cache
    def run(group: str) -> dict[str, Any]:
        output = folder / str(GROUPS.index(group))
        asked = {name for (name,) in selected(request, "name")}
        names = [name for name in CASES if name in asked and _is_of(name, group)]
        only = ",".join(names or ["environment"])  # no name would be all of them
        done = command("--device", "cpu", "--only", only, "--output", str(output))
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
        assert done.stdout == (output / "report.md").read_text()
        return json.loads((output / "report.json").read_text()) | {"printed": done.stdout}

    return lambda name: run(next(group for group in GROUPS if _is_of(name, group)))


@pytest.mark.parametrize("name", slow_unless_in(FAST.split(), CASES))
def test_a_case_runs(reports: Callable[[str], dict[str, Any]], name: str):
    report = reports(name)
    case = report["cases"][name]
    assert case["verdict"] == ("not run" if name in FOR_CUDA else "passed"), case["lines"]
    for verdict, text in case["lines"]:
        assert verdict != "not run" or ": " in text, "no reason"
    assert f"## {name}\n" in report["printed"]


def test_layouts_of_more_gpus_than_there_are_do_not_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(running, "_in_a_process", lambda case, place: Notes([("passed", "it ran")]))
    place, results = Place("cuda", tmp_path, num_gpus=2), {}
    for case in CASES.values():
        results[case.name] = run_case(case, place, results)
    asked = {name: layout.ranks for name, layout in LAYOUTS.items()}
    missing = {name for name, ranks in asked.items() if ranks in (4, 8)}
    assert {name for name, result in results.items() if result.verdict != "passed"} >= missing
    assert {name for name in asked if results[name].verdict == "passed"} == set(asked) - missing
    for name in missing:
        (line,) = results[name].notes.lines
        said = f"{name}: it needs {asked[name]} GPUs, and this machine has 2"
        assert line == ("not run", said)


def test_the_report_has_the_versions(reports: Callable[[str], dict[str, Any]]):
    printed = reports("fp16")["printed"]
    assert f"* torch: {torch.__version__.split('+')[0]}" in printed
    assert f"* package: {made_by()['sources']}\n" in printed


def test_every_system_and_layout_is_a_case():
    assert {f"train_{system}" for system in SYSTEMS} < set(CASES)
    assert set(LAYOUTS) < set(CASES)
    assert {case for fault in SABOTAGES.values() for case in fault.cases} < set(CASES)


def test_a_case_comes_after_what_it_needs():
    assert chosen("serve") == ["environment", "text", "convert", "serve"]
    with_references = ["reference_gmlp", "reference_layouts", "train_gmlp", "dp2"]
    assert chosen("train_gmlp,dp2") == ["environment", *with_references]
    assert {f"reference_{system}" for system in SYSTEMS} < set(chosen("transformer_engine"))
    assert chosen(None) == list(CASES)


def raising(place: Place, notes: Notes) -> None:
    notes.passed("before that")
    raise ValueError("over several\nlines")


def crashing(place: Place, notes: Notes) -> None:
    print("the last words", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def hanging(place: Place, notes: Notes) -> None:
    time.sleep(600)


def working(place: Place, notes: Notes) -> None:
    notes.passed("it works")


BAD = {
    "raising": ("ValueError: over several lines", 60),
    "crashing": (r"exit code -9: .*the last words", 60),
    "hanging": ("no end after 1 seconds", 1),
}


@pytest.fixture
def cases(monkeypatch: pytest.MonkeyPatch) -> dict[str, Case]:
    """Replace the real cases with these, in forked processes too."""
    own = {name: Case(name, globals()[name], limit=limit) for name, (_, limit) in BAD.items()}
    own["working"] = Case("working", working)
    own["waiting"] = Case("waiting", working, needs=("raising",))
    monkeypatch.setattr(running, "CASES", own)
    monkeypatch.setattr(running, "ON_CPU", 1)
    return own


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_bad_case_fails_and_the_others_go_on(cases: dict[str, Case], tmp_path: Path):
    report = Report(Place("cpu", tmp_path))
    for case in cases.values():
        report.add(run_case(case, report.place, report.results))
    verdicts = {name: result.verdict for name, result in report.results.items()}
    assert verdicts == dict.fromkeys(BAD, "failed") | {"working": "passed", "waiting": "not run"}
    for name, (message, _) in BAD.items():
        text = report.results[name].notes.lines[-1][1]
        assert re.search(message, text), text
    assert report.failed == list(BAD)
    text = report.markdown()
    assert "1 passed, 3 failed, 1 not run" in text
    assert "## The end of crashing.log\n\n    the last words\n" in text
    assert "* not run: waiting: case raising did not pass" in text


def test_without_a_gpu_it_says_so_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(program, "count_gpus", lambda: 0)
    assert program.main([]) == 2
    error = capsys.readouterr().err
    assert error.startswith("first-gpu: error: --device cuda: torch finds no CUDA device")
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--only", "train_gmpl", "--only train_gmpl: no case has that in its name: environment,"),
        ("--output", ".", "--output . has other files, and would be emptied: name a new folder"),
    ],
)
def test_a_wrong_flag_is_refused(
    capsys: pytest.CaptureFixture[str], flag: str, value: str, said: str
):
    with pytest.raises(SystemExit, match="2"):
        options_of(["--device", "cpu", flag, value])
    assert f"first-gpu: error: {said}" in capsys.readouterr().err


def test_what_a_case_measures_on_cuda_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The CPU stands in for CUDA, where torch warns of a read; the first step is not watched.
    With a fault of the device, the comparison with the CPU fails."""
    place, notes, modes = Place("cuda", tmp_path), Notes(), []
    read = StepAgreement.read

    def waiting(agreement: StepAgreement) -> Any:
        if modes[-1:] == ["warn"]:
            warnings.warn(WAIT, stacklevel=2)
        return read(agreement)

    try:
        reference(place, Notes(), name="gmlp")
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append, raising=False)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
        monkeypatch.setattr(StepAgreement, "read", waiting)
        trains(place, notes, system="gmlp")
        watched = list(modes)
        monkeypatch.setenv(VARIABLE, "gate-zero")
        trains(place, broken := Notes(), system="gmlp")
    finally:
        torch.distributed.destroy_process_group()
    assert [text for verdict, text in broken.lines if verdict == "failed" and "CPU, in" in text]
    assert notes.verdict == "passed", notes.lines
    said = [text for _, text in notes.lines]
    assert "against the CPU: bitwise" in said
    assert any(text.startswith("peak memory 0 MiB, estimated ") for text in said)
    assert watched == ["default"] * 2 + ["warn", "default"] * (NUM_STEPS - 1)
    assert list(notes.data["synchronisations"].values()) == [NUM_STEPS - 1]
    assert any(text.startswith("host synchronisations: 1.0 a step: ") for text in said)


@pytest.mark.parametrize(
    ("capability", "launched", "verdicts"),
    [
        ((9, 0), True, ["passed"] * 2),
        ((9, 0), False, ["failed"] * 2),
        ((12, 0), False, ["failed", "not run"]),
        ((7, 5), False, ["not run"] * 2),
    ],
)
def test_a_gpu_has_to_launch_the_kernels_that_it_can_run(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    launched: bool,
    verdicts: list[str],
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    norm = [f"norm: {name}" for name in KERNELS["norm"][1:]]
    counts = Counter(dict.fromkeys([*norm, "grouped: grouped_mm"], 2) if launched else {norm[0]: 2})
    notes = Notes()
    check_launches(notes, counts, ("norm", "grouped"))
    assert [verdict for verdict, _ in notes.lines] == verdicts
    if verdicts[0] == "failed":
        assert notes.lines[0][1] == "kernels of norm: 2 launches, and none of norm: gradients"


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_estimate_takes_every_cases_flags(tmp_path: Path, system: str):
    assert estimated_memory(run_flags(Place("cuda", tmp_path), system)) > 2**20


M, B, ROUTER = "layers.0.spatial.weight", "layers.0.spatial.bias", "layers.0.mlp.router.weight"


def run_of(**changes: Any) -> Run:
    """Return three steps and three parameters; `changes` maps M, B or ROUTER to other values."""
    known = {M: torch.ones(2, 8, 8), B: torch.ones(2, 8), ROUTER: torch.ones(4, 4)}
    return Run(
        [Step(6.0, 1.0)] * 3, known | {globals()[name]: values for name, values in changes.items()}
    )


ONE_ROW = torch.ones(2, 8)
ONE_ROW[0, 3] = 1.05


@pytest.mark.parametrize(
    ("ours", "verdict", "said"),
    [
        (run_of(M=torch.full((2, 8, 8), 1.02)), "passed", "M 2.0, M, worst row 2.0"),
        (run_of(M=torch.full((2, 8, 8), 1.04)), "failed", ": M 4.0, M, worst row 4.0; 3 are"),
        (run_of(M=torch.full((2, 8, 8), float("nan"))), "failed", "M nan"),
        (run_of(B=ONE_ROW), "failed", ": b, worst row 3.5; 3 are"),
        (Run(run_of().steps[:2], run_of().gradients), "failed", "2 steps, where 3"),
        (
            Run(run_of().steps, {M: torch.ones(2, 8, 8)}),
            "failed",
            f"one of them has: {ROUTER}, {B}",
        ),
    ],
)
def test_a_run_may_lie_a_few_roundings_away(ours: Run, verdict: str, said: str):
    notes, rounding = Notes(), distances(run_of(), run_of())
    known = Reference(run_of(), dict.fromkeys(rounding, 0.01))
    compare(notes, "it", ours, known)
    assert notes.verdict == verdict
    assert said in notes.lines[0][1]


def test_a_unit_is_not_smaller_than_chance_makes_it():
    measured = {"loss": 1e-5, "gradient norm": 2e-3, "M": 0.01}
    assert unless_by_chance(measured, 256) == measured | {"loss": 2**-13}
    routed = unless_by_chance(measured | {"routers": 0.2}, 256)
    assert routed == {"loss": 2**-13, "gradient norm": 2e-3, "M": 1 / 16, "routers": 0.2}


@pytest.mark.slow
@pytest.mark.parametrize("name", SABOTAGES)
def test_a_broken_device_fails_its_cases(tmp_path: Path, name: str):
    """By a comparison, not an error; `test_a_case_runs` is the same without a fault."""
    flags = ("--device", "cpu", "--sabotage", name)
    done = command(*flags, "--output", str(tmp_path / "report"))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert done.stdout.startswith(
        f"# First run on the CPU in place of a GPU, sabotaged by {name}\n"
    )
    report = json.loads((tmp_path / "report" / "report.json").read_text())["cases"]
    for case in SABOTAGES[name].cases:
        bad = [text for verdict, text in report[case]["lines"] if verdict == "failed"]
        assert bad
        assert not [text for text in bad if "Error" in text]
    assert all(
        result["verdict"] == "passed" for case, result in report.items() if "reference" in case
    )
