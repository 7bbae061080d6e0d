"""Run one case: a process with a time limit, its log, and its notes."""

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
from typing import Any
from unittest import mock

from support.first_gpu.cases import CASES, Case
from support.first_gpu.notes import Notes, Place, Verdict
from support.first_gpu.sabotage import VARIABLE
from support.launches import REPOSITORY
from support.ranks import forkserver

LAST_LINES = 5
ON_CPU = 5
"""Factor on a case's limit: a CPU in place of a GPU is slower, and shared by many."""
MOST_THREADS = 16
NVML = "PYTORCH_NVML_BASED_CUDA_CHECK"
"""With it torch asks NVML whether there is a GPU, so that a process can still be forked."""


@dataclass(frozen=True)
class Result:
    """The result of a case."""

    name: str
    notes: Notes
    seconds: float

    @property
    def verdict(self) -> Verdict:
        return self.notes.verdict


def import_once() -> None:
    """Import Megatron, which takes longer than a case, before processes are forked."""
    os.environ[NVML] = "1"
    import support.preloaded  # noqa: F401


def forks_use_gpu() -> bool:
    """Return whether a fork of this process can use the GPU. It cannot if an import has called
    CUDA; each case is then spawned, which takes longer."""
    process = multiprocessing.get_context("fork").Process(target=_touch_gpu)
    process.start()
    process.join(60)
    if process.is_alive():
        process.kill()
    return process.exitcode == 0


def _touch_gpu() -> None:
    import torch

    torch.zeros(1, device="cuda").item()


def context_of(case: Case, place: Place) -> Any:
    """Return the multiprocessing context in which a case starts."""
    if case.is_reference and not place.on_cpu:
        return forkserver()  # its processes saw no GPU when they imported
    return multiprocessing.get_context("fork" if place.can_fork else "spawn")


def run_case(case: Case, place: Place, before: Mapping[str, Result]) -> Result:
    """Run a case if what it needs is there; return a result whatever happens to its process."""
    if not place.on_cpu and place.num_gpus < case.gpus:
        here = f"it needs {case.gpus} GPUs, and this machine has {place.num_gpus}"
        return Result(case.name, Notes([("not run", f"{case.name}: {here}")]), 0.0)
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
    context = context_of(case, place)
    written = place.folder / f"{case.name}.json"
    log_of(case.name, place).touch()
    process = context.Process(target=_work, args=(case.name, place, written))
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if case.is_reference or place.on_cpu else {}
    with mock.patch.dict(os.environ, hidden):
        process.start()
    limit = case.limit * (ON_CPU if place.on_cpu else place.patience)
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
        reason = f"its process ended with exit code {process.exitcode}: {_last_lines(case, place)}"
        return Notes([("failed", reason)])
    return Notes.read(written)


def log_of(name: str, place: Place) -> Path:
    """Return the file for what the case and the libraries print."""
    return place.folder / f"{name}.log"


def _last_lines(case: Case, place: Place) -> str:
    lines = log_of(case.name, place).read_text(encoding="utf-8", errors="replace").splitlines()
    return " | ".join(lines[-LAST_LINES:])


def _work(name: str, place: Place, written: Path) -> None:
    """Run a case in a process group of its own, so that a time limit ends its ranks too."""
    os.setsid()
    log = os.open(log_of(name, place), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(log, stream.fileno())
    if str(REPOSITORY) not in sys.path:
        sys.path.insert(0, str(REPOSITORY))
    os.environ.pop(NVML, None)
    if place.sabotage and not CASES[name].is_reference:
        os.environ[VARIABLE] = place.sabotage
    notes = Notes()
    try:
        CASES[name].run(place, notes)
    except BaseException as error:
        traceback.print_exc()
        reason = " ".join(str(error).split())[:300]
        notes.failed(f"{type(error).__name__}: {reason}")
    notes.write(written)
