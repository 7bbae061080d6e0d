"""One case: a process with a time limit, its log, and what it noted."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from support.first_gpu.cases import CASES, Case
from support.first_gpu.notes import Notes, Place, Verdict
from support.launches import REPOSITORY

LAST_LINES = 5
ON_CPU = 5
"""Times the limit of a case: a CPU in the place of a GPU is slower, and shared by many."""


@dataclass(frozen=True)
class Result:
    """Of a case."""

    name: str
    notes: Notes
    seconds: float

    @property
    def verdict(self) -> Verdict:
        return self.notes.verdict


def import_once() -> None:
    """Megatron's imports take longer than a case: on a CPU, processes are forked behind them."""
    import support.preloaded  # noqa: F401


def run_case(case: Case, place: Place, before: Mapping[str, Result]) -> Result:
    """Run it where what it needs is there; whatever happens to its process, there is a result."""
    passed = {name for name, result in before.items() if result.verdict == "passed"}
    missing = [name for name in case.needs if name not in passed]
    if missing:
        notes = Notes([("not run", f"{case.name}: case {missing[0]} did not pass")])
        return Result(case.name, notes, 0.0)
    print(f"first-gpu: {case.name} ...", file=sys.stderr, end=" ", flush=True)
    start = time.perf_counter()
    notes = _in_a_process(case, place)
    result = Result(case.name, notes, time.perf_counter() - start)
    print(f"{result.verdict}, {result.seconds:.0f} s", file=sys.stderr, flush=True)
    return result


def _in_a_process(case: Case, place: Place) -> Notes:
    # A process that has asked for CUDA devices cannot be forked into one that uses them.
    context = multiprocessing.get_context("fork" if place.on_cpu else "spawn")
    written = place.folder / f"{case.name}.json"
    log_of(case.name, place).touch()
    process = context.Process(target=_work, args=(case.name, place, written))
    process.start()
    limit = case.limit * (ON_CPU if place.on_cpu else 1)
    is_late = False
    try:
        process.join(limit)
        is_late = process.is_alive()
    finally:  # Ctrl-C reaches this process alone
        if process.is_alive():
            with contextlib.suppress(ProcessLookupError):  # it may end at this moment
                os.killpg(process.pid or 0, signal.SIGKILL)
            process.join()
    if is_late:
        return Notes([("failed", f"no end after {limit} seconds, then ended")])
    if not written.is_file():
        words = f"its process ended with exit code {process.exitcode}: {_last_lines(case, place)}"
        return Notes([("failed", words)])
    return Notes.read(written)


def log_of(name: str, place: Place) -> Path:
    """Return the file for what the case and the libraries print."""
    return place.folder / f"{name}.log"


def _last_lines(case: Case, place: Place) -> str:
    lines = log_of(case.name, place).read_text(encoding="utf-8", errors="replace").splitlines()
    return " | ".join(lines[-LAST_LINES:])


def _work(name: str, place: Place, written: Path) -> None:
    """The process of a case, in a group of its own: a time limit ends its ranks too."""
    os.setsid()
    log = os.open(log_of(name, place), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(log, stream.fileno())
    if str(REPOSITORY) not in sys.path:
        sys.path.insert(0, str(REPOSITORY))
    notes = Notes()
    try:
        CASES[name].run(place, notes)
    except BaseException as error:
        traceback.print_exc()
        reason = " ".join(str(error).split())[:300]
        notes.failed(f"{type(error).__name__}: {reason}")
    notes.write(written)
