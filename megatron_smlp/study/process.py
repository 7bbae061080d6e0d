"""One command of pretrain_smlp.py: how it is spelt, started, watched and ended."""

from __future__ import annotations

import contextlib
import importlib.util
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from megatron_smlp.durable import write_durably
from megatron_smlp.errors import UsageError
from megatron_smlp.launching.parent import end_with_parent

OUTPUT = "output.log"
FLAGS = "flags.yaml"
POLL_SECONDS = 1.0
LAST_LINES = 12
LAUNCH = "from megatron_smlp.commands import launch; launch()"
"""Starts the project's agent, which ends with the code of the rank that failed (torchrun with 1):
that of a loss that is not finite tells a run that diverged from one that failed."""
REFUSED = "is being written by"
"""Of the message of a training whose checkpoints another process writes (checkpoints/claim.py)."""
PATIENCE = 60.0  # seconds, for a run that saves before it ends


def training_command(
    folder: Path, flags: Mapping[str, Any], *, paths: Sequence[str], processes: int
) -> list[str]:
    """Write the flags of a run to its folder, and return the command that trains by them."""
    folder.mkdir(parents=True, exist_ok=True)
    spelt = {name.replace("_", "-"): value for name, value in sorted(flags.items())}
    write_durably(folder / FLAGS, yaml.safe_dump(spelt, sort_keys=False))
    several = ["-c", LAUNCH, "agent", "--standalone", f"--nproc-per-node={processes}"]
    return [
        sys.executable,
        *(several if processes > 1 else []),
        *(_script(), "--config", str(folder / FLAGS)),
        *paths,
    ]


def _script() -> str:
    spec = importlib.util.find_spec("pretrain_smlp")
    if spec is None or spec.origin is None:
        raise UsageError("pretrain_smlp.py is not there: run tools/study.py, or `make env` first.")
    return spec.origin


def run_command(
    command: Sequence[str], *, folder: Path, stop: threading.Event, watch: Callable[[], None]
) -> int:
    """Run a command, its output in the folder's log; return its exit code.

    Args:
        stop: ends the command when it is set.
        watch: called about once a second.
    """
    with (folder / OUTPUT).open("ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            process_group=0,  # Ctrl-C is the worker's, which ends the run so that it saves
            # Two must not train one run, where a worker is killed and its run goes on.
            preexec_fn=partial(end_with_parent, signal.SIGTERM),
        )
        with _ended_with_us(process):
            while process.poll() is None and not stop.wait(POLL_SECONDS):
                watch()
        return process.returncode


@contextlib.contextmanager
def _ended_with_us(process: subprocess.Popen[bytes]) -> Iterator[None]:
    try:
        yield
    finally:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE)
            process.kill()
            process.wait()


def output_bytes(folder: Path) -> int:
    """Return how much a run's commands have printed so far."""
    output = folder / OUTPUT
    return output.stat().st_size if output.exists() else 0


def refusal(folder: Path, code: int, *, since: int) -> str:
    """Return the line by which a command that ended with this code was kept out of its checkpoints,
    by another process that writes there; empty: it was not.

    Args:
        since: bytes that had been printed before it; an agent prints more behind the line.
    """
    if code != UsageError.exit_code:
        return ""
    text = (folder / OUTPUT).read_bytes()[since:].decode(errors="replace")
    return next((line for line in text.splitlines() if REFUSED in line), "")


def last_lines(folder: Path) -> list[str]:
    """Return the end of what a run printed."""
    try:
        text = (folder / OUTPUT).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    return text.splitlines()[-LAST_LINES:]
