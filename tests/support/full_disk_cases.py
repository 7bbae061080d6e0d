"""Cases on a file system of their own, run by tests/support/small_disk.py."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import pretrain
from support.conversions import assert_same, folder_weights, from_hf, run
from support.deletion import hidden_in
from support.small_disk import fill

from megatron_smlp.checkpoints.folders import (
    checkpoint_of,
    iteration_folder,
    iterations,
    tracked_iteration,
)
from megatron_smlp.checkpoints.integrity import verify
from megatron_smlp.checkpoints.reader import TorchDistReader
from megatron_smlp.conversion import convert
from megatron_smlp.errors import SaveError, UsageError
from megatron_smlp.metrics_records import MetricsFile
from megatron_smlp.program import readable_errors

CONVERSIONS: dict[str, Any] = {
    "hf": from_hf,
    "to hf": convert.torch_dist_to_hf,
}
ROOM = 40  # kilobytes left free: half a checkpoint


def run_with_one_checkpoint(disk: Path, finished: str) -> Path:
    run = disk / "run"
    shutil.copytree(iteration_folder(finished, 2), iteration_folder(run, 2))
    fill(disk, leave=ROOM)
    return run


def assert_intact(run: Path) -> None:
    assert iterations(run) == [2]
    assert verify(iteration_folder(run, 2)) == []
    assert tracked_iteration(run) in (None, 2)
    assert not hidden_in(run)


def stop(disk: str, how: str, finished: str) -> None:
    """Check that a failed save ends the run and spares the checkpoint; logs are on another disk."""
    run = run_with_one_checkpoint(Path(disk), finished)
    with contextlib.suppress(SaveError):
        try:
            pretrain(f"--save {run} --log-dir {disk}.log {how}")
        except SaveError as error:
            print(f"error: {error}")
            raise
        raise AssertionError("it ended well")
    assert_intact(run)


def go_on(disk: str, how: str, finished: str) -> None:
    """Train on after failed saves, with some room and with none, where the logs are lost too."""
    run = run_with_one_checkpoint(Path(disk), finished)
    flags = f"--save {run} --on-save-failure continue {how}"
    with pytest.raises(SaveError, match="the last checkpoint, of iteration 6"):
        pretrain(f"{flags} --log-dir {disk}.log")
    assert_intact(run)
    print("no room at all", flush=True)
    fill(run.parent, leave=0)
    with pytest.raises(SaveError, match="the last checkpoint, of iteration 6"):
        pretrain(flags)
    assert_intact(run)


def train_with_tensorboard(disk: str) -> None:
    fill(Path(disk), leave=4)
    flags = f"--tensorboard-dir {disk}/tensorboard --tensorboard-log-interval 1 --train-iters 80"
    pretrain(f"{flags} --log-dir {disk}.log")


def write_metrics(disk: str) -> None:
    """Write records before, while and after the disk is full."""
    metrics = MetricsFile(disk)
    metrics.write({"iteration": 1, "note": "x" * 3000})
    ballast = fill(Path(disk), leave=0)
    for iteration in (2, 3):
        metrics.write({"iteration": iteration, "note": "x" * 3000})
    ballast.unlink()
    metrics.write({"iteration": 4})
    lines = (Path(disk) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [1, 4]


def convert_without_room(disk: str, kind: str, source: str) -> None:
    target = Path(disk) / "out"
    with pytest.raises(UsageError, match="cannot be written: No space left on device"):
        run(CONVERSIONS[kind], Path(source), target)
    assert list(Path(disk).iterdir()) == []


def stop_conversions(disk: str, kind: str, source: str) -> None:
    """Send SIGINT, SIGTERM and SIGKILL at random moments: the output is complete or absent."""
    target, draw = Path(disk) / "out", random.Random(kind)
    assert ended(start_converting(kind, source, target)) == 0
    expected = contents(target)
    shutil.rmtree(target)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        process = start_converting(kind, source, target)
        while not list(target.parent.glob(".out.partial-*")) and not target.exists():
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.1))
        os.kill(process, number)
        code = ended(process)
        print(kind, number, code, target.exists())
        assert code in (0, 130, -signal.SIGTERM, -signal.SIGKILL)
        if code in (0, 130):
            assert not list(target.parent.glob(".out.*"))
        assert target.exists() or code  # or it came when all was done
        if target.exists():
            assert_same(contents(target), expected)
            shutil.rmtree(target)
        for left in target.parent.glob(".out.*"):
            shutil.rmtree(left)


def start_converting(kind: str, source: str, target: Path) -> int:
    """Convert in a child process, whose parent has never had process groups."""
    process = os.fork()
    if process:
        return process
    try:
        with readable_errors("convert_checkpoint.py"):
            run(CONVERSIONS[kind], Path(source), target)
        os._exit(0)
    except SystemExit as end:
        os._exit(int(end.code or 0))
    finally:
        os._exit(1)


def ended(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def contents(folder: Path) -> dict[str, Any]:
    """Return all tensors of an exported folder, or of a checkpoint after checking its checksums."""
    if (folder / "config.json").exists():
        return folder_weights(folder)
    checkpoint = TorchDistReader(checkpoint_of(folder))
    assert verify(checkpoint.folder) == []
    return {name: checkpoint.read(name) for name in checkpoint.all_specs}
