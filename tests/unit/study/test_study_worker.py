"""Workers on runs with simulated training: what they do if another worker is faster."""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.living import lives
from support.studies import state_of, study_argv, write_metrics, write_study

from megatron_smlp.checkpoints.folders import iteration_folder
from megatron_smlp.errors import NonFiniteLossError
from megatron_smlp.study import cli, metrics, process, worker
from megatron_smlp.study.data import StudyData
from megatron_smlp.study.plan import PlannedRun
from megatron_smlp.study.state import CHECKPOINTS, DIVERGED, DONE, FAILED, State
from megatron_smlp.study.worker import Worker


@pytest.fixture
def known(tmp_path: Path) -> State:
    """Return a study with three trials a system, and one run of each that the trials decide."""
    tuning = {"seed": 1, "horizon": "50K", "lr": [0.5, 1, 2]}
    path = write_study(
        tmp_path, systems=["transformer", "smlp_deterministic"], tuning=tuning,
        horizons=["100K"], seeds=[11],
    )  # fmt: skip
    return state_of(path, runs=tmp_path / "runs")


@pytest.fixture(autouse=True)
def without_data_and_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StudyData, "flags", [])
    monkeypatch.setattr(worker, "WAIT_SECONDS", 0.01)


@pytest.fixture
def trained(known: State, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replace training by a stub; return the folders of the runs it was called for, in order."""
    folders: list[Path] = []

    def train(_: object, *, folder: Path, **__: object) -> int:
        [run] = [one for one in known.plan().runs if known.folder_of(one) == folder]
        folders.append(folder)
        write_metrics(folder, run, 5.0 + abs(run.factor - 1))
        iteration_folder(folder / CHECKPOINTS, run.end).mkdir(parents=True)
        return 0

    monkeypatch.setattr(worker, "run_command", train)
    return folders


def new_worker(known: State, folder: Path, *, processes: int = 1) -> Worker:
    return Worker(state=known, data=StudyData(folder), processes=processes)


def ended(known: State, run: PlannedRun) -> tuple[str, int]:
    ending = known.ending(run) or {}
    return ending["status"], ending["attempts"]


def make(known: State, run: PlannedRun, folder: Path, *, processes: int = 1) -> None:
    lease = known.take(known.folder_of(run))
    assert lease is not None
    with lease, worker.Progress(1) as progress:
        one = new_worker(known, folder, processes=processes)
        one._make(run, lease, known.plan(), progress)


def test_a_run_that_a_killed_worker_left_whole_is_not_trained_past_its_end(
    known: State, trained: list[Path], tmp_path: Path
):
    """The worker was killed between the last checkpoint and recording that the run is over."""
    first = known.plan().runs[0]
    folder = known.folder_of(first)
    folder.mkdir(parents=True)
    write_metrics(folder, first, 5.0)
    iteration_folder(folder / CHECKPOINTS, first.end).mkdir(parents=True)
    new_worker(known, tmp_path).work()
    assert folder not in trained
    assert len(trained) == 7
    assert known.status(first) == DONE


def test_a_run_that_falls_short_twice_is_a_failure(
    known: State, trained: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    starts: list[Path] = []

    def fall_short(_: object, *, folder: Path, **__: object) -> int:
        starts.append(folder)
        return 0

    monkeypatch.setattr(worker, "run_command", fall_short)
    new_worker(known, tmp_path).work()
    assert {known.status(run) for run in known.plan().runs} == {FAILED}
    assert len(starts) == worker.ATTEMPTS * len(known.plan().runs)
    assert known.failure(known.plan()).endswith("blocked runs: 2")


def test_a_branch_that_is_tried_again_goes_on_from_its_trunk(
    tmp_path: Path, trained: list[Path], monkeypatch: pytest.MonkeyPatch
):
    """The trunk is kept while a branch has failed, and retrained only if it was lost."""
    path = write_study(tmp_path, systems=["transformer"], subject="transformer", seeds=[11],
                       horizons=["50K", "100K"])  # fmt: skip
    known = state_of(path, runs=tmp_path / "more")
    trunk, branch, rest = known.plan().runs
    broken, starts = [True], []

    def train(_: object, *, folder: Path, **__: object) -> int:
        [run] = [one for one in known.plan().runs if known.folder_of(one) == folder]
        starts.append(run)
        if run == branch and broken:
            return 1
        write_metrics(folder, run, 5.0)
        iteration_folder(folder / CHECKPOINTS, run.end).mkdir(parents=True)
        return 0

    monkeypatch.setattr(worker, "run_command", train)
    new_worker(known, tmp_path).work()
    assert starts == [trunk, branch, branch, rest]
    broken.clear()
    starts.clear()
    known.retry_failures()
    new_worker(known, tmp_path).work()
    assert starts == [branch]
    checkpoints = known.folder_of(trunk) / CHECKPOINTS
    assert not checkpoints.exists()
    iteration_folder(checkpoints, trunk.end - 1).mkdir(parents=True)  # it is running again
    assert not known.has_checkpoint(trunk)


def test_what_would_go_on_from_a_trunk_that_diverged_is_of_its_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A report leaves out a seed whose sources are not known."""
    path = write_study(tmp_path, systems=["transformer"], subject="transformer", seeds=[11],
                       horizons=["50K", "100K"])  # fmt: skip
    known = state_of(path, runs=tmp_path / "more")

    def diverges(_: object, *, folder: Path, **__: object) -> int:
        iteration_folder(folder / CHECKPOINTS, 1).mkdir(parents=True)
        return NonFiniteLossError.exit_code

    monkeypatch.setattr(worker, "run_command", diverges)
    new_worker(known, tmp_path).work()
    trunk, *branches = known.plan().runs
    assert not (known.folder_of(trunk) / CHECKPOINTS).exists()
    assert {known.status(run) for run in (trunk, *branches)} == {DIVERGED}
    assert known.made_by(trunk)["sources"]
    assert all(known.made_by(run) == known.made_by(trunk) for run in branches)


def test_a_training_that_is_asked_to_stop_goes_on(
    known: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    first = known.plan().runs[0]
    ends = iter((1, 2, 3, first.end))

    def stopped(_: object, *, folder: Path, **__: object) -> int:
        write_metrics(folder, first, 5.0)
        iteration_folder(folder / CHECKPOINTS, next(ends)).mkdir(parents=True)
        return 0

    monkeypatch.setattr(worker, "run_command", stopped)
    make(known, first, tmp_path)
    assert ended(known, first) == (DONE, 4)


@pytest.mark.usefixtures("undrawn")
def test_a_failed_trial_does_not_stop_the_other_systems(
    known: State,
    trained: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """A second worker finds nothing to do and says why, as does a report of the CSV files; a worker
    with --retry completes the study."""
    first, train = known.plan().runs[0], worker.run_command

    def fail_first(command: Sequence[str], *, folder: Path, **how: Any) -> int:
        return 1 if folder == known.folder_of(first) else train(command, folder=folder, **how)

    monkeypatch.setattr(worker, "run_command", fail_first)
    monkeypatch.setattr(process, "run_command", lambda *_, **__: 1)  # no fingerprints
    monkeypatch.setattr(StudyData, "contents", lambda _: {})
    monkeypatch.setattr(StudyData, "check_vocabulary", lambda *_: None)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    line = f"failed: {first.title}; blocked runs: 1"
    for _ in range(2):
        assert cli.main(study_argv("run", tmp_path)) == 1
        assert f"{line}. See tools/study.py status" in capsys.readouterr().err
    mains = [run for run in known.plan().runs if run.phase == "main"]
    assert [run.system for run in mains] == ["smlp_deterministic"]
    assert known.status(mains[0]) == DONE
    assert cli.main(study_argv("status", tmp_path)) == 0
    assert line in capsys.readouterr().out.splitlines()
    for runs in ("runs", "none"):
        assert cli.main(study_argv("report", tmp_path, "--runs", str(tmp_path / runs))) == 0
        text = (tmp_path / "results" / "report.md").read_text()
        assert f"**Not whole**: 6 of 8 runs are over; {line}." in text
        assert "smlp_deterministic | 5.000 |" in text
    mains = []

    def look(command: Sequence[str], *, folder: Path, **how: Any) -> int:
        mains.append(sum(run.phase == "main" for run in known.plan().runs))
        return train(command, folder=folder, **how)

    monkeypatch.setattr(worker, "run_command", look)
    assert cli.main(study_argv("run", tmp_path, "--retry")) == 0
    assert trained[6] == known.folder_of(first)
    assert len(trained) == len(set(trained)) == 8
    assert mains[0] == 1, "it holds its own system alone"
    assert {known.status(run) for run in known.plan().runs} == {DONE}
    assert known.failure(known.plan()) == ""


@pytest.mark.slow
def test_a_run_of_several_processes_that_diverges_is_no_failure(
    known: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The launcher of its ranks passes on its exit code: it is not trained a second time."""
    script = tmp_path / "pretrain_smlp.py"
    script.write_text("raise SystemExit(3)\n", encoding="utf-8")
    monkeypatch.setattr(process, "_script", lambda: str(script))
    first = known.plan().runs[0]
    make(known, first, tmp_path, processes=2)
    assert ended(known, first) == (DIVERGED, 1)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell a child")
def test_a_training_ends_with_its_worker(tmp_path: Path):
    code = (
        "import sys, threading; from pathlib import Path;"
        "from megatron_smlp.study.process import run_command;"
        "run_command(['sh', '-c', 'echo $$ > pid; exec sleep 600'], folder=Path('.'),"
        " stop=threading.Event(), watch=lambda: None)"
    )
    started = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert started.poll() is None
        time.sleep(0.02)
    time.sleep(0.2)
    child = int((tmp_path / "pid").read_text())
    started.kill()
    started.wait()
    end = time.monotonic() + 30
    while lives(child) and time.monotonic() < end:
        time.sleep(0.05)
    assert not lives(child)


def test_the_last_step_is_read_at_the_end_of_a_file(tmp_path: Path):
    assert metrics.last_step(tmp_path)[0] == 0
    lines = [{"iteration": number, "loss": 1.0 + number} for number in range(1, 5000)]
    lines.append({"iteration": 4999, "validation_loss": 2.0})
    text = "".join(f"{json.dumps(line)}\n" for line in lines) + '{"iteration": 50'
    (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8")
    assert len(text) > 2 * metrics.TAIL_BYTES
    assert metrics.last_step(tmp_path) == (4999, 5000.0)
