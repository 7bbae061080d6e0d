"""A study's forked trainings compute, fail and end like the commands that they stand for."""

import json
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

pytestmark = pytest.mark.slow

WORKER = (
    "import json, sys, threading; from pathlib import Path; sys.path.insert(0, '.');"
    "from megatron_smlp.study.process import run_command;"
    "print([run_command(argv, folder=Path(folder), stop=threading.Event(), watch=lambda: None)"
    " for folder, argv in json.loads(sys.argv[1])])"
)
"""Runs in a separate process: the tests' own may have forked others, which are sped up."""


def argv_of(folder: Path, more: str) -> list[str]:
    flags = f"{MINIMAL} {RUN} --save {folder / 'checkpoints'} --log-dir {folder} {more}"
    return [sys.executable, str(REPOSITORY / "pretrain_smlp.py"), *flags.split()]


def worker(commands: list[tuple[str, list[str]]]) -> subprocess.Popen[bytes]:
    """Run commands, each in its folder, one after another, and print their exit codes."""
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, json.dumps(commands)], cwd=REPOSITORY,
        env=clean_environment(), start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_it_computes_and_fails_as_the_program(tmp_path: Path):
    """Losses are bitwise equal; a failure has the program's exit code and last line."""
    folders = {name: tmp_path / name for name in ("program", "trains", "diverges")}
    for folder in folders.values():
        folder.mkdir()
    with (folders["program"] / OUTPUT).open("ab") as log:
        command = argv_of(folders["program"], "")
        assert not subprocess.call(command, env=clean_environment(), stdout=log, stderr=log)
    cases = {"trains": "", "diverges": "--lr 1e38"}
    forks = [(str(folders[name]), argv_of(folders[name], more)) for name, more in cases.items()]
    codes = [0, NonFiniteLossError.exit_code]
    assert worker(forks).communicate(timeout=300)[0].decode() == f"{codes}\n"
    assert len(steps(folders["program"])) == 6
    assert steps(folders["trains"]) == steps(folders["program"])
    assert last_lines(folders["diverges"])[-1].startswith("pretrain_smlp.py: error: ")


@pytest.mark.parametrize("is_killed", [True, False])
def test_it_ends_with_its_worker(tmp_path: Path, is_killed: bool):
    """It saves before it ends, whether the worker is killed or interrupted by Ctrl-C."""
    flags = argv_of(tmp_path, "--train-iters 100000 --save-interval 100000")
    study = worker([(str(tmp_path), flags)])
    wait_for(lambda: (tmp_path / "metrics.jsonl").exists())
    if is_killed:
        study.kill()
    else:
        os.killpg(study.pid, signal.SIGINT)
    wait_for(lambda: tracked_iteration(tmp_path / "checkpoints"))
    wait_for(lambda: "stopped at iteration" in (tmp_path / OUTPUT).read_text(encoding="utf-8"))
    said = study.communicate(timeout=120)[1].decode()
    assert study.returncode == (-signal.SIGKILL if is_killed else -signal.SIGINT)
    assert said.count("Traceback") == (0 if is_killed else 1)  # of the worker above alone


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)
