"""Trainings of a study that are forks: they compute, fail and end as the commands that they are."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.checkpoints import RUN
from support.in_process import MINIMAL
from support.launches import REPOSITORY, clean_environment, steps

from megatron_smlp.checkpoints.folders import tracked_iteration
from megatron_smlp.errors import NonFiniteLossError
from megatron_smlp.study.process import OUTPUT, last_lines

Start = Callable[[list[str], Path], subprocess.Popen[bytes]]

WORKER = (
    "import sys, threading; from pathlib import Path; sys.path.insert(0, '.');"
    "from megatron_smlp.study.process import run_command;"
    "sys.exit(run_command(sys.argv[2:], folder=Path(sys.argv[1]), stop=threading.Event(),"
    " watch=lambda: None))"
)
"""In a process of its own: that of the tests may have forked others, which were made quicker."""


def words_of(folder: Path, more: str) -> list[str]:
    words = f"{MINIMAL} {RUN} --save {folder / 'checkpoints'} --log-dir {folder} {more}"
    return [sys.executable, str(REPOSITORY / "pretrain_smlp.py"), *words.split()]


def worker(command: list[str], folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, str(folder), *command], cwd=REPOSITORY,
        env=clean_environment(), start_new_session=True, stderr=subprocess.PIPE,
    )  # fmt: skip


def program(command: list[str], folder: Path) -> subprocess.Popen[bytes]:
    with (folder / OUTPUT).open("ab") as log:
        return subprocess.Popen(command, env=clean_environment(), stdout=log, stderr=log)


def ended(start: Start, folder: Path, more: str = "") -> int:
    folder.mkdir()
    return start(words_of(folder, more), folder).wait(300)


def test_the_losses_are_the_same_to_the_bit(tmp_path: Path):
    fork, own = tmp_path / "fork", tmp_path / "program"
    assert [ended(worker, fork), ended(program, own)] == [0, 0]
    assert len(steps(own)) == 6
    assert steps(fork) == steps(own)


def test_it_fails_alike(tmp_path: Path):
    fork, own = tmp_path / "fork", tmp_path / "program"
    codes = [
        ended(start, folder, "--lr 1e38") for start, folder in ((worker, fork), (program, own))
    ]
    assert codes == [NonFiniteLossError.exit_code] * 2
    assert last_lines(own)[-1].startswith("pretrain_smlp.py: error: ")
    assert last_lines(fork)[-1] == last_lines(own)[-1]


@pytest.mark.parametrize("is_killed", [True, False])
def test_it_ends_with_its_worker(tmp_path: Path, is_killed: bool):
    """It saves before it ends, whether the worker is killed or Ctrl-C interrupts it."""
    one = worker(words_of(tmp_path, "--train-iters 100000 --save-interval 100000"), tmp_path)
    wait_for(lambda: (tmp_path / "metrics.jsonl").exists())
    if is_killed:
        one.kill()
    else:
        os.killpg(one.pid, signal.SIGINT)
    wait_for(lambda: tracked_iteration(tmp_path / "checkpoints"))
    wait_for(lambda: "stopped at iteration" in (tmp_path / OUTPUT).read_text(encoding="utf-8"))
    said = one.communicate(timeout=120)[1].decode()
    assert one.returncode == (-signal.SIGKILL if is_killed else -signal.SIGINT)
    assert said.count("Traceback") == (0 if is_killed else 1)  # of the worker above alone


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)
