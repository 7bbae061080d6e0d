"""Saves in the background, saves that fail, and which checkpoints are kept."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import assert_ends_like, checkpoint_tensors, pretrain
from support.deletion import hidden_in
from support.launches import REPOSITORY, clean_environment

from megatron_smlp.checkpoints import gpu_memory, saving
from megatron_smlp.checkpoints.folders import iteration_folder, iterations
from megatron_smlp.checkpoints.integrity import verify
from megatron_smlp.errors import NonFiniteLossError, SaveError
from megatron_smlp.training.events import Outcome
from megatron_smlp.training.reporting import Reporter


def test_a_save_in_the_background_holds_the_step_that_asked_for_it(
    finished_run: Path, tmp_path: Path
):
    """Not the weights as later steps changed them meanwhile."""
    run = tmp_path / "run"
    pretrain(f"--save {run} --async-save")
    assert iterations(run) == [2, 4, 6]
    assert [verify(iteration_folder(run, n)) for n in (2, 4, 6)] == [[], [], []]
    assert_ends_like(run, finished_run)
    for iteration in (2, 4):
        mine, other = (checkpoint_tensors(folder, iteration) for folder in (run, finished_run))
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[name], other[name]) for name in mine)
    assert not hidden_in(run)


def test_a_loss_that_is_not_finite_costs_no_save_in_the_background(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The second update ruins the weights; the saves before it are still being written then."""
    add = saving.add_share

    def add_slowly(*given: Any) -> None:
        time.sleep(0.5)
        add(*given)

    monkeypatch.setattr(saving, "add_share", add_slowly)
    flags = "--async-save --save-interval 1 --lr 1e30 --lr-decay-style constant"
    with pytest.raises(NonFiniteLossError, match="at iteration 3"):
        pretrain(f"--save {tmp_path} {flags}")
    assert iterations(tmp_path) == [1, 2]
    assert [verify(iteration_folder(tmp_path, n)) for n in (1, 2)] == [[], []]


GATHERING = "--use-distributed-optimizer --exit-interval 2"


@pytest.mark.parametrize("whose", ["ours", "another rank's"])
def test_a_gpu_without_room_is_a_save_that_failed(
    whose: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """All ranks learn of it before any would wait for another."""

    def refuse(*_: int) -> None:
        raise torch.OutOfMemoryError

    problem = "a GPU lacks memory for 0.0 GiB of optimizer state"
    if whose == "ours":
        monkeypatch.setattr(gpu_memory, "_take", refuse)
    else:
        others = {list: [problem]}  # they agree in everything else
        monkeypatch.setattr(saving, "gathered", lambda own: [own, others.get(type(own), own)])
    flags = f"--save {tmp_path / 'run'} {GATHERING}"
    with pytest.raises(SaveError) as caught:
        pretrain(flags)
    said = f"iteration 2 could not be saved to {tmp_path / 'run'}: {problem}; no"
    assert said in str(caught.value)
    assert "--distrib-optim-fully-reshardable-mem-efficient" in str(caught.value)
    with pytest.raises(SaveError, match="the last checkpoint, of iteration 2, could not be saved"):
        pretrain(f"{flags} --on-save-failure continue")
    assert f"{problem}; no checkpoint exists yet. The run continues" in capfd.readouterr().out
    assert iterations(tmp_path / "run") == []
    assert not hidden_in(tmp_path / "run")
    if whose == "ours":
        pretrain(f"{flags} --optimizer-checkpoint data_parallel")
        assert iterations(tmp_path / "run") == [2]


@pytest.mark.parametrize(("how", "argv"), [("", "--exit-interval 5"), ("--async-save", "")])
def test_a_folder_that_vanishes_is_not_made_again(
    tmp_path: Path,
    how: str,
    argv: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    """As when a disk is gone: the first save that misses it says so, as does the exit code."""
    run = tmp_path / "run"
    stepped = Reporter.stepped

    def vanish(self: Reporter, outcome: Outcome) -> None:
        stepped(self, outcome)
        if outcome.iteration == 3:
            # Atomically, like an unmount: a partly deleted tree could still be written to.
            run.rename(tempfile.mkdtemp(dir=tmp_path))

    monkeypatch.setattr(Reporter, "stepped", vanish)
    flags = f"--save {run} --log-dir {tmp_path / 'log'} {how} {argv}"
    last = 5 if argv else 6
    with pytest.raises(SaveError, match=rf"the last checkpoint, of iteration {last}, could not"):
        pretrain(f"{flags} --on-save-failure continue")
    assert not run.exists()
    output = capfd.readouterr().out
    assert f"iteration 4 could not be saved to {run}: {run}: No such" in output
    assert ("stopped at iteration 5 (--exit-interval): not saved" in output) == bool(argv)
    if not how:
        with pytest.raises(SaveError, match=r"iteration 4 could not be saved to .*: No such file"):
            pretrain(flags)


@pytest.mark.parametrize(
    ("flags", "kept"),
    [("--keep-last 2 --keep-every 3", [3, 5, 6]), ("--save-retain-interval 4", [4, 6])],
)
def test_old_checkpoints_go_when_the_new_one_is_there(tmp_path: Path, flags: str, kept: list[int]):
    pretrain(f"--save {tmp_path} --save-interval 1 {flags}")
    assert iterations(tmp_path) == kept
    assert not hidden_in(tmp_path)


# A rank is killed when the process that it forked for a save has written almost everything.
KILLED_RANK = """
import os, signal, sys, time
from megatron_smlp.checkpoints import saving
from support.checkpoints import pretrain

def kill(*_):
    os.kill(rank, signal.SIGKILL)
    time.sleep(1000)

rank, saving.add_share = os.getpid(), kill
pretrain(f"--save {sys.argv[1]} --async-save")
"""


@pytest.mark.slow
def test_a_writer_ends_with_its_rank(tmp_path: Path):
    """Otherwise it would hold on to the rank's GPU, sockets and memory when the next run starts."""
    rank = subprocess.Popen(
        [sys.executable, "-c", KILLED_RANK, str(tmp_path / "run")],
        cwd=REPOSITORY,
        env=clean_environment(PYTHONPATH=f"{REPOSITORY / 'tests'}:{REPOSITORY}"),
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        rank.communicate(timeout=120)  # until both have closed the pipe
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(rank.pid, signal.SIGKILL)
    assert rank.returncode == -signal.SIGKILL
