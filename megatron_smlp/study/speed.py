"""Time the steps of all systems in turn, on an otherwise idle machine."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

from megatron_smlp.errors import UsageError
from megatron_smlp.progress import Progress
from megatron_smlp.study.data import StudyData
from megatron_smlp.study.process import last_lines, train_shortly
from megatron_smlp.study.state import State
from megatron_smlp.study.systems import System

PARTS = 10  # of a run, each timed as a whole: logging may take longer than a single step
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def time_systems(
    known: State, data: StudyData, *, processes: int
) -> Iterator[list[dict[str, Any]]]:
    """Yield a line for each system, after each round.

    Each round begins with a different system, and each system with a matrix product, which shows
    how fast the machine is at that time.

    Raises:
        UsageError: a run failed.
    """
    names, speed = list(known.systems), known.study.speed
    with Progress(speed.rounds * len(names)) as progress:
        for number in range(1, speed.rounds + 1):
            lines: list[dict[str, Any]] = []
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                done = (number - 1) * len(names) + len(lines)
                progress.show(done, f"round {number} of {speed.rounds}: {name}")
                system = known.systems[name]
                product = _product(system)
                timed = _time(known, system, data, processes=processes)
                lines.append({
                    "system": name, **timed, **product,
                    "processes": processes, "steps": speed.steps,
                })  # fmt: skip
            yield lines


def _product(system: System) -> dict[str, float]:
    """Return the speed of a large matrix product in the training's dtype, and its thread count,
    which is that of a training process."""
    dtype = next((name for name in DTYPES if system.flags.get(name)), "fp32")
    command = [sys.executable, "-m", "megatron_smlp.study.gemm", DTYPES[dtype]]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return {"gemm_tflops": float(printed[0]), "threads": int(printed[1])}


def _time(known: State, system: System, data: StudyData, *, processes: int) -> dict[str, float]:
    """Return the fastest part of the second half of a short run: other users of the machine's
    memory slow it down for seconds at a time, which may affect even the median."""
    folder = known.folder / "speed" / system.name
    steps = known.study.speed.steps
    code, logged = train_shortly(
        system, data, folder=folder, processes=processes, stop=threading.Event(),
        train_iters=steps, eval_iters=0, log_interval=max(1, steps // PARTS),
    )  # fmt: skip
    records = [record for record in logged if "seconds_per_iteration" in record]
    if code or not records:
        text = "\n".join(f"  {line}" for line in last_lines(folder))
        raise UsageError(f"timing {system.name} failed ({code}), {folder}:\n{text}")
    later = records[len(records) // 2 :]
    fastest = min(later, key=lambda record: record["seconds_per_iteration"])
    return {
        "seconds_per_iteration": fastest["seconds_per_iteration"],
        "tokens_per_second": fastest["tokens_per_second"],
        "tflops": fastest["tflops_per_device"],
    }
