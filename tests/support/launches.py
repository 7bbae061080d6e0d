"""Start pretrainings from a test, many per launch, and read what they logged."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.launcher_variables import is_of_a_launcher
from support.ranks import REPOSITORY, TIME_LIMIT, forkserver, rank_process, run_ranks
from support.runs import run_all, run_program

RUNS = REPOSITORY / "tests" / "support" / "runs.py"


@dataclass(frozen=True)
class Step:
    """The part of a line of metrics.jsonl that a layout may not change."""

    loss: float
    grad_norm: float


def launch(runs: Mapping[str, str], *, processes: int, folder: Path, **variables: str) -> None:
    """Run each command line of pretrain_smlp.py, one after another, in `processes` processes.

    Args:
        runs: name -> flags; the metrics of a run are kept in `folder`/name.
        variables: environment variables.
    """
    if not runs:
        return
    plan = _plan(runs, processes, folder)
    launch_calls(run_all, str(plan), processes=processes, log=plan.with_suffix(".log"), **variables)


def launch_on_the_stand_in(runs: Mapping[int, Mapping[str, str]], *, folder: Path) -> None:
    """Do the same with the CPU standing in for a CUDA device, set up before all imports.

    Args:
        runs: number of processes -> runs; one Python process forks all ranks.
    """
    plans = [[str(_plan(some, count, folder)), str(count)] for count, some in runs.items() if some]
    if plans:
        run_command([sys.executable, str(RUNS), *itertools.chain(*plans)], CUDA_VISIBLE_DEVICES="")


def _plan(runs: Mapping[str, str], processes: int, folder: Path) -> Path:
    """Write the command lines that `run_all` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    plan = folder / f"runs-{processes}.json"
    command_lines = [
        [*flags.split(), "--log-dir", str(folder / name), "--distributed-timeout-minutes", "2"]
        for name, flags in runs.items()
    ]
    plan.write_text(json.dumps(command_lines), encoding="utf-8")
    return plan


def launch_calls(
    work: Callable[..., None], *arguments: Any, processes: int, log: Path, **variables: str
) -> None:
    """Call a function of an importable module in `processes` ranks."""
    environment = clean_environment(**variables)
    run_ranks(forkserver(), processes, work, arguments, log=log, environment=environment)


def start_program(argv: Sequence[str], *, log: Path) -> Any:
    """Start pretrain_smlp.py with this argv and return its process.

    It is forked from one that has imported Megatron: it trains after one second, not ten.
    """
    environment = clean_environment()
    process = rank_process(
        forkserver(), run_program, (list(argv),), log=log, environment=environment
    )
    process.start()
    return process


def wait_for_line(start: str, log: Path, process: Any) -> str:
    """Wait until the log has a whole line that begins so, and return it; fail if the process ends
    first."""
    while True:
        is_alive = process.is_alive()
        text = log.read_text(encoding="utf-8") if log.exists() else ""
        for line in text.splitlines(keepends=True):
            if line.startswith(start) and line.endswith("\n"):
                return line.rstrip("\n")
        assert is_alive, text
        time.sleep(0.05)


def import_benchmarks() -> None:
    """Make the scripts of benchmarks/ importable: they import each other, but are no package."""
    sys.path.insert(0, str(REPOSITORY / "benchmarks"))


def run_command(
    command: Sequence[str | Path],
    *,
    cwd: Path = REPOSITORY,
    code: int = 0,
    stdin: str = "",
    seconds: float = TIME_LIMIT,
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Run a command, by default in the repository, with one OpenMP thread per process, and check
    its exit code; on a mismatch the assertion shows its output."""
    done = subprocess.run(
        command, cwd=cwd, env=clean_environment(**variables), input=stdin,
        capture_output=True, text=True, timeout=seconds, check=False,
    )  # fmt: skip
    assert done.returncode == code, (
        f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}\n{done.stderr[-20000:]}"
    )
    return done


def clean_environment(**variables: str) -> dict[str, str]:
    """Return this process's environment without a launcher's variables, and with `variables`."""
    kept = {name: value for name, value in os.environ.items() if not is_of_a_launcher(name)}
    return {**kept, "OMP_NUM_THREADS": "1", **variables}


def records(folder: Path) -> list[dict[str, Any]]:
    """Return the records that a run logged to `folder`/metrics.jsonl, in order."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def steps(folder: Path) -> list[Step]:
    """Return the training steps among a run's records."""
    return [Step(r["loss"], r["grad_norm"]) for r in records(folder) if "loss" in r]
