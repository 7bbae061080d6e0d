"""`make first-gpu` with the CPU in place of a GPU: its cases run, and none ends the others."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support.first_gpu import running
from support.first_gpu.__main__ import chosen
from support.first_gpu.cases import CASES, Case, estimated_memory
from support.first_gpu.notes import Notes, Place
from support.first_gpu.report import Report
from support.first_gpu.running import run_case
from support.first_gpu.training import NUM_STEPS, Watching, synchronisations, train, words
from support.launches import REPOSITORY, Step, clean_environment
from support.systems import SYSTEMS

FOR_CUDA = {"environment", "cpu_losses", "fp16", "transformer_engine"}
"""Cases that have no meaning on a CPU."""


def command(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "support.first_gpu", *flags],
        cwd=REPOSITORY,
        env=clean_environment(PYTHONPATH="tests:."),
        capture_output=True,
        text=True,
        timeout=3000,
        check=False,
    )


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The JSON report of all cases, and the printed one."""
    folder: Path = tmp_path_factory.mktemp("first_gpu") / "out"
    done = command("--device", "cpu", "--output", str(folder))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert done.stdout == (folder / "report.md").read_text()
    return json.loads((folder / "report.json").read_text()) | {"printed": done.stdout}


@pytest.mark.parametrize("name", CASES)
def test_a_case_runs(everything: dict[str, Any], name: str):
    case = everything["cases"][name]
    assert case["verdict"] == ("not run" if name in FOR_CUDA else "passed"), case["lines"]
    for verdict, text in case["lines"]:
        assert verdict != "not run" or ": " in text, "no reason"
    assert f"## {name}\n" in everything["printed"]


def test_the_report_says_what_to_send_and_with_which_versions(everything: dict[str, Any]):
    printed = everything["printed"]
    assert f"* torch: {torch.__version__.split('+')[0]}" in printed
    assert "## What to send to the maintainers" in printed
    assert "the CPU in place of a GPU" in printed
    assert f"{len(CASES) - len(FOR_CUDA)} passed, 0 failed, {len(FOR_CUDA)} not run" in printed


def test_every_system_and_layout_is_a_case():
    assert {f"train_{system}" for system in SYSTEMS} < set(CASES)
    assert {"tp2", "pp2", "ep2", "dp2"} < set(CASES)
    assert chosen("serve") == ["environment", "text", "convert", "serve"]


def raising(place: Place, notes: Notes) -> None:
    notes.passed("before that")
    raise ValueError("over several\nlines")


def refusing(place: Place, notes: Notes) -> None:
    raise SystemExit("refused")


def crashing(place: Place, notes: Notes) -> None:
    print("the last words", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def hanging(place: Place, notes: Notes) -> None:
    time.sleep(600)


def working(place: Place, notes: Notes) -> None:
    notes.passed("it works")


BAD = {
    "raising": ("ValueError: over several lines", 60),
    "refusing": ("SystemExit: refused", 60),
    "crashing": (r"exit code -9: .*the last words", 60),
    "hanging": ("no end after 1 seconds", 1),
}


@pytest.fixture
def cases(monkeypatch: pytest.MonkeyPatch) -> dict[str, Case]:
    """These in the place of the real ones, in the processes that are forked too."""
    own = {name: Case(name, globals()[name], limit=limit) for name, (_, limit) in BAD.items()}
    own["working"] = Case("working", working)
    own["waiting"] = Case("waiting", working, needs=("raising",))
    monkeypatch.setattr(running, "CASES", own)
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
    assert "1 passed, 4 failed, 1 not run" in text
    assert "`raising.log`, `refusing.log`, `crashing.log`, `hanging.log`" in text
    assert "* not run: waiting: case raising did not pass" in text


def test_without_a_gpu_it_says_so_in_a_line():
    done = command()
    assert done.returncode == 2
    assert done.stderr.startswith("first-gpu: error: --device cuda: torch finds no CUDA device")
    assert len(done.stderr.splitlines()) == 1


def test_waiting_for_the_device_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A switch that warns where it is set, as torch's does in what follows."""
    modes = []

    def set_mode(mode: str) -> None:
        modes.append(mode)
        if mode == "warn":
            warnings.warn("called a synchronizing CUDA operation", stacklevel=2)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode, raising=False)
    place = Place("cpu", tmp_path)
    try:
        assert len(train(words(place, "gmlp"), tmp_path / "log", observe=Watching)) == NUM_STEPS
    finally:
        torch.distributed.destroy_process_group()
    assert modes == ["default", "warn"] * (NUM_STEPS - 1) + ["default"]
    [(line, count)] = synchronisations(tmp_path / "log").items()
    assert line.startswith("training.py:")
    assert count == NUM_STEPS - 1


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_estimate_takes_every_cases_flags(tmp_path: Path, system: str):
    assert estimated_memory(words(Place("cuda", tmp_path), system)) > 2**20


def test_steps_are_compared():
    steps = [Step(2.0, 1.0), Step(1.0, 0.5)]
    for ours, is_good in (
        (steps, True),
        ([Step(2.0, 1.0), Step(1.01, 0.5)], True),
        ([Step(2.0, 1.0), Step(1.05, 0.5)], False),
        ([Step(2.0, 1.0), Step(1.0, 0.6)], False),
        ([Step(2.0, 1.0), Step(float("nan"), 0.5)], False),
        (steps[:1], False),
        ([], False),
    ):
        notes = Notes()
        notes.same_steps("these", ours, steps, tolerance=0.02)
        assert notes.verdict == ("passed" if is_good else "failed"), ours
