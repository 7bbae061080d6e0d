"""Starts pretrainings from a test, many in one launch, and reads what they logged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.ranks import REPOSITORY, TIME_LIMIT, forkserver, run_ranks
from support.runs import run_all

RUNS = REPOSITORY / "tests" / "support" / "runs.py"


@dataclass(frozen=True)
class Step:
    """One line of metrics.jsonl: what a layout may not change."""

    loss: float
    grad_norm: float


def launch(runs: Mapping[str, str], *, processes: int, folder: Path, **variables: str) -> None:
    """Run each command line of pretrain_smlp.py, one after the other, in `processes` processes.

    Args:
        runs: name -> flags; the metrics of a run are kept in `folder`/name.
        variables: of the environment.
    """
    if not runs:
        return
    folder.mkdir(parents=True, exist_ok=True)
    command_lines = [
        [*flags.split(), "--log-dir", str(folder / name), "--distributed-timeout-minutes", "2"]
        for name, flags in runs.items()
    ]
    plan = folder / f"runs-{processes}.json"
    plan.write_text(json.dumps(command_lines), encoding="utf-8")
    if "CUDA_STAND_IN" in variables:  # it is there before Megatron is imported
        run_command([sys.executable, str(RUNS), str(plan), str(processes)], **variables)
        return
    launch_calls(run_all, str(plan), processes=processes, log=plan.with_suffix(".log"), **variables)


def launch_calls(
    work: Callable[..., None], *arguments: Any, processes: int, log: Path, **variables: str
) -> None:
    """Call a function of an importable module in `processes` ranks."""
    environment = clean_environment(**variables)
    run_ranks(forkserver(), processes, work, arguments, log=log, environment=environment)


def run_command(command: Sequence[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the repository, one OpenMP thread a process; its output is the failure."""
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=clean_environment(**variables),
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT,
        check=False,
    )
    assert done.returncode == 0, (
        f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-20000:]}"
    )
    return done


def clean_environment(**variables: str) -> dict[str, str]:
    """This process's environment without what a launcher left in it."""
    launcher = {
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    }
    kept = {name: value for name, value in os.environ.items() if name not in launcher}
    return {**kept, "OMP_NUM_THREADS": "1", **variables}


def records(folder: Path) -> list[dict[str, Any]]:
    """What a run logged to `folder`/metrics.jsonl, in order."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def steps(folder: Path) -> list[Step]:
    """The training steps among them."""
    return [Step(r["loss"], r["grad_norm"]) for r in records(folder) if "loss" in r]
