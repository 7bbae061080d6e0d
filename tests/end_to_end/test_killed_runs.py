"""Runs that save every two steps, stopped at random moments, lose nothing, bit for bit."""

import json
import signal
from pathlib import Path

import pytest
from support.checkpoints import RUN, assert_ends_like
from support.cover import slow_unless_in
from support.in_process import MINIMAL
from support.killed_runs import run_all
from support.launches import launch_calls

from megatron_smlp.checkpoints.folders import iteration_folder, iterations
from megatron_smlp.checkpoints.integrity import verify

STEPS = 20
FLAGS = f"{' '.join(MINIMAL.split())} {RUN} --train-iters {STEPS} --keep-last 2 --keep-every 10"
TENSOR_PARALLEL = "--tensor-model-parallel-size 2"
DATA_PARALLEL = "--micro-batch-size 1 --use-distributed-optimizer"


def check_stopped(
    folder: Path, how: str, *, stops: int, seed: int, by: str = "kill", ranks: int = 1
) -> set[int]:
    """Check runs that are stopped and restarted; return the exit codes of the stopped ones."""
    plan = {"flags": f"{FLAGS} {how}", "folder": str(folder), "stops": stops, "seed": seed}
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
    assert ": not loaded" not in logs, "what a stop leaves is no damaged checkpoint"
    if by == "keyboard":
        assert "Traceback" not in logs, logs
    return set(result["codes"])


KILLS = {
    # Flags, stops, seed, ranks.
    "two": ("", 2, 11, 1),
    "thirty": ("", 30, 12, 1),
    "thirty, async": ("--async-save", 30, 12, 1),
    **{f"of ranks {layout} {how}": (f"{layout} {how}", 8, 13, 2)
       for layout in (TENSOR_PARALLEL, DATA_PARALLEL) for how in ("", "--async-save")},
}  # fmt: skip


@pytest.mark.parametrize("kills", slow_unless_in(["two"], KILLS))
def test_kills(tmp_path: Path, kills: str):
    how, stops, seed, ranks = KILLS[kills]
    check_stopped(tmp_path, how, stops=stops, seed=seed, ranks=ranks)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["", "--async-save"])
def test_the_keyboard_stops_a_run_that_saves(tmp_path: Path, how: str):
    """Ctrl-C once or twice leaves a whole checkpoint or the one before, never half of one."""
    codes = check_stopped(tmp_path, how, stops=4, seed=5, by="keyboard")
    assert codes <= {0, 128 + signal.SIGINT}
