"""Time the steps of all systems in turns, on a machine where nothing else runs."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

from megatron_smlp.errors import UsageError
from megatron_smlp.metrics_records import FILE_NAME
from megatron_smlp.progress import Progress
from megatron_smlp.study.data import StudyData
from megatron_smlp.study.metrics import read_records
from megatron_smlp.study.process import last_lines, run_command, training_command
from megatron_smlp.study.state import State
from megatron_smlp.study.systems import System

PARTS = 10  # of a sample, each timed as a whole: a step may be shorter than what logging it takes
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def time_systems(
    known: State, data: StudyData, *, processes: int
) -> Iterator[list[dict[str, Any]]]:
    """Yield after each round a line for each system and round so far.

    Each round begins with a matrix product, and then with another system.

    Raises:
        UsageError: a run failed.
    """
    names, speed = list(known.systems), known.study.speed
    lines: list[dict[str, Any]] = []
    with Progress(speed.rounds * len(names)) as progress:
        for number in range(1, speed.rounds + 1):
            shift = number % len(names)
            gemm = _gemm_tflops(known.systems[names[0]])
            for name in names[shift:] + names[:shift]:
                progress.show(len(lines), f"round {number} of {speed.rounds}: {name}")
                system = known.systems[name]
                timed = _time(known, system, data, processes=processes)
                lines.append({
                    "system": name, "round": number, **timed, "gemm_tflops": gemm,
                    "processes": processes, "steps": speed.steps,
                })  # fmt: skip
            yield lines


def _gemm_tflops(system: System) -> float:
    """Return the speed of a large product, in the dtype of the trainings."""
    dtype = next((name for name in DTYPES if system.flags.get(name)), "fp32")
    command = [sys.executable, "-m", "megatron_smlp.study.gemm", DTYPES[dtype]]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _time(known: State, system: System, data: StudyData, *, processes: int) -> dict[str, float]:
    """Return the median part of the second half of a short run, which a moment's disturbance of
    the machine leaves as it is."""
    folder = known.folder / "speed" / system.name
    (folder / FILE_NAME).unlink(missing_ok=True)
    steps = known.study.speed.steps
    flags = {name: value for name, value in system.flags.items() if not name.startswith("lr_")}
    flags |= {
        "seed": 1,
        "train_iters": steps,
        "eval_iters": 0,
        "log_interval": max(1, steps // PARTS),
    }
    paths = [*data.flags, "--log-dir", str(folder)]
    command = training_command(folder, flags, paths=paths, processes=processes)
    code = run_command(command, folder=folder, stop=threading.Event(), watch=lambda: None)
    records = [record for record in read_records(folder) if "seconds_per_iteration" in record]
    if code or not records:
        text = "\n".join(f"  {line}" for line in last_lines(folder))
        raise UsageError(f"timing {system.name} failed ({code}), {folder}:\n{text}")
    later = sorted(records[len(records) // 2 :], key=lambda record: record["seconds_per_iteration"])
    median = later[len(later) // 2]
    return {
        "seconds_per_iteration": median["seconds_per_iteration"],
        "tokens_per_second": median["tokens_per_second"],
        "tflops": median["tflops_per_device"],
    }
