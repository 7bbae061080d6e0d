"""Runs that save every two steps, stopped at random moments: nothing is lost, bit by bit."""

import json
import signal
from pathlib import Path

import pytest
from support.checkpoints import RUN, assert_ends_like
from support.in_process import MINIMAL
from support.killed_runs import run_all
from support.launches import launch_calls

from megatron_smlp.checkpoints.folders import iteration_folder, iterations
from megatron_smlp.checkpoints.integrity import verify

STEPS = 20
WORDS = f"{' '.join(MINIMAL.split())} {RUN} --train-iters {STEPS} --keep-last 2 --keep-every 10"
TENSOR_PARALLEL = "--tensor-model-parallel-size 2"
DATA_PARALLEL = "--micro-batch-size 1 --use-distributed-optimizer"
HOW = ["", "--async-save"]


def check_stopped(
    folder: Path, how: str, *, stops: int, seed: int, by: str = "kill", ranks: int = 1
) -> set[int]:
    """The exit codes of the runs that were stopped."""
    plan = {"words": f"{WORDS} {how}", "folder": str(folder), "stops": stops, "seed": seed}
    plan |= {"by": by, "ranks": ranks}
    (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    log = folder / "stops.log"
    launch_calls(run_all, folder / "plan.json", processes=1, log=log)
    result = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
    assert result["stops"] == stops
    logs = ""
    for chain in map(str, range(result["chains"])):
        run = folder / chain
        assert_ends_like(run, folder / "undisturbed", iteration=STEPS)
        whole = iterations(run)
        assert whole[-1] == STEPS
        assert by == "keyboard" or whole == [10, STEPS - 2, STEPS]
        assert [verify(iteration_folder(run, n)) for n in whole] == [[]] * len(whole)
        logs += (folder / f"{chain}.log").read_text(encoding="utf-8")
    assert "resumed from iteration" in logs, "none came after the first save"
    assert "it is not loaded" not in logs, "what a stop leaves is no damaged checkpoint"
    if by == "keyboard":
        assert "Traceback" not in logs, logs
    return set(result["codes"])


@pytest.mark.parametrize("how", ["", pytest.param("--async-save", marks=pytest.mark.slow)])
def test_a_few_kills(tmp_path: Path, how: str):
    check_stopped(tmp_path, how, stops=3, seed=11)


@pytest.mark.slow
def test_a_few_kills_of_ranks(tmp_path: Path):
    check_stopped(tmp_path, f"{TENSOR_PARALLEL} --async-save", stops=3, seed=3, ranks=2)


@pytest.mark.parametrize("how", ["", pytest.param("--async-save", marks=pytest.mark.slow)])
def test_the_keyboard_stops_a_run_that_saves(tmp_path: Path, how: str):
    """Once, then twice, in some order: a whole checkpoint, or the one before, never a half one."""
    codes = check_stopped(tmp_path, how, stops=4, seed=5, by="keyboard")
    assert codes <= {0, 128 + signal.SIGINT}


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
def test_thirty_kills(tmp_path: Path, how: str):
    check_stopped(tmp_path, how, stops=30, seed=12)


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("layout", [TENSOR_PARALLEL, DATA_PARALLEL])
def test_kills_of_ranks(tmp_path: Path, layout: str, how: str):
    check_stopped(tmp_path, f"{layout} {how}", stops=8, seed=13, ranks=2)
