"""Build, start, watch and end one command of pretrain_smlp.py.

A single-process training on a CPU is forked from a process that has imported Megatron, and trains
after a second; its losses are those of the command. A run on a GPU or with several processes is a
program of its own, because a process that has initialized CUDA cannot be forked, and because
several ranks are started by an agent.
"""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from megatron_smlp.durable import write_durably
from megatron_smlp.launching.parent import end_with_parent
from megatron_smlp.launching.settings import ALONE
from megatron_smlp.metrics_records import FILE_NAME, Record
from megatron_smlp.platform import choice
from megatron_smlp.plugin_files import KEY
from megatron_smlp.plugin_texts import LOADED
from megatron_smlp.provenance import made_by, package_now
from megatron_smlp.study.data import StudyData
from megatron_smlp.study.metrics import read_records
from megatron_smlp.study.systems import System

OUTPUT = "output.log"
FLAGS = "flags.yaml"
POLL_SECONDS = 1.0
LAST_LINES = 12
LAUNCH = "from megatron_smlp.commands import launch; launch()"
"""Start the project's agent, which exits with the code of the failed rank (torchrun exits with 1):
the code for a nonfinite loss tells a diverged run from a failed one."""
PATIENCE = 60.0  # seconds for a run to save before it is killed


def training_command(
    folder: Path, flags: Mapping[str, Any], *, paths: Sequence[str], processes: int
) -> list[str]:
    """Write the flags of a run to its folder, and return the command that trains with them."""
    folder.mkdir(parents=True, exist_ok=True)
    spelt = {name.replace("_", "-"): value for name, value in sorted(flags.items())}
    if plugins := plugin_paths(flags):
        spelt[KEY] = plugins
    write_durably(folder / FLAGS, yaml.safe_dump(spelt, sort_keys=False))
    several = ["-c", LAUNCH, "agent", *ALONE, f"--nproc-per-node={processes}"]
    return [
        sys.executable,
        *(several if processes > 1 else []),
        *(_script(), "--config", str(folder / FLAGS)),
        *paths,
    ]


def plugin_paths(flags: Mapping[str, Any]) -> list[str]:
    """Return the paths of a run's plugins, which its flags list by name."""
    return [str(LOADED[Path(name).stem].path) for name in flags.get(KEY, ())]


def _script() -> str:
    spec = importlib.util.find_spec("pretrain_smlp")
    assert spec is not None  # tools/study.py and an installation have it on the path
    return str(spec.origin)


def run_command(
    command: Sequence[str],
    *,
    folder: Path,
    stop: threading.Event,
    watch: Callable[[], None] = lambda: None,
) -> int:
    """Run a command, with its output appended to the folder's log; return its exit code.

    Args:
        stop: ends the command when it is set.
        watch: called about once a second.
    """
    start = _Fork.of if _may_be_forked(command) else _program
    with (folder / OUTPUT).open("ab") as log:
        process = start(command, log)
    try:
        while process.poll() is None and not stop.is_set():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(POLL_SECONDS)
            watch()
    finally:
        _end(process)
    return process.wait()


def train_shortly(
    system: System,
    data: StudyData,
    *,
    folder: Path,
    processes: int,
    stop: threading.Event,
    **flags: int,
) -> tuple[int, list[Record]]:
    """Train a system briefly from scratch, without learning-rate schedule or checkpoint, to measure
    its speed or its first steps; return the exit code and the logged records.

    Args:
        flags: flags of the training, which override the system's.
    """
    (folder / FILE_NAME).unlink(missing_ok=True)
    own = {name: value for name, value in system.flags.items() if not name.startswith("lr_")}
    command = training_command(
        folder, own | {"seed": 1} | flags, paths=[*data.flags, "--log-dir", str(folder)],
        processes=processes,
    )  # fmt: skip
    code = run_command(command, folder=folder, stop=stop)
    return code, read_records(folder)


def _may_be_forked(command: Sequence[str]) -> bool:
    return [*command[:2]] == [sys.executable, _script()] and _is_on_cpu()


def _is_on_cpu() -> bool:
    return os.environ.get(choice.VISIBLE) in ("", "-1") or not choice.has_nvidia_device()


def made_by_next(processes: int) -> dict[str, str | None]:
    """Return the commit and sources of the next training: those on disk now or, for a fork, those
    that the process it is forked from has read. Plugins are always read anew."""
    plugins = [(name, plugin.path.read_text(encoding="utf-8")) for name, plugin in LOADED.items()]
    return made_by(plugins, _package_of_forks() if processes == 1 and _is_on_cpu() else None)


_package_of_forks = cache(package_now)


def _program(command: Sequence[str], log: BinaryIO) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        process_group=0,  # the worker handles Ctrl-C, and ends the run so that it saves
        # If the run outlived a killed worker, two processes might train it.
        preexec_fn=partial(end_with_parent, signal.SIGTERM),
    )


class _Fork(ForkServerProcess):
    """A forked training, with the methods of Popen that are used here."""

    @classmethod
    def of(cls, command: Sequence[str], log: BinaryIO) -> _Fork:
        multiprocessing.set_forkserver_preload(["megatron_smlp.study.preloaded"])
        process = cls(target=_train, args=(command[2:], log.name))
        process.start()
        return process

    def poll(self) -> int | None:
        return self.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.join(timeout)
        if self.exitcode is None:
            raise subprocess.TimeoutExpired("a training", timeout or 0.0)
        return self.exitcode


def _train(argv: Sequence[str], log: str) -> None:
    """Act as the program that `_program` starts: with these arguments, and ended the same way."""
    import pretrain_smlp

    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with Path(log).open("ab") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    end_with_parent(signal.SIGTERM)  # the fork server's end; the worker is watched below
    threading.Thread(target=_end_with_worker, daemon=True).start()
    sys.argv = ["pretrain_smlp.py", *argv]
    pretrain_smlp.run()


def _end_with_worker() -> None:
    worker = multiprocessing.parent_process()
    assert worker is not None
    wait([worker.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def _end(process: subprocess.Popen[bytes] | _Fork) -> None:
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
        process.kill()
        process.wait()


def last_lines(folder: Path) -> list[str]:
    try:
        text = (folder / OUTPUT).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    return text.splitlines()[-LAST_LINES:]
