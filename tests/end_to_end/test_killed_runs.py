"""kill -9 at random moments of a run that saves every two steps: nothing is lost, bit by bit."""

import json
import sys
from pathlib import Path

import pytest
from support.checkpoints import RUN, assert_ends_like
from support.in_process import MINIMAL
from support.launches import REPOSITORY, run_command

from megatron_smlp.checkpoints.integrity import verify
from megatron_smlp.checkpoints.structure import iteration_folder, iterations

STEPS = 20
WORDS = f"{' '.join(MINIMAL.split())} {RUN} --train-iters {STEPS} --keep-last 2 --keep-every 10"


def check_killed(folder: Path, how: str, *, kills: int, seed: int) -> None:
    plan = {"words": f"{WORDS} {how}", "folder": str(folder), "kills": kills, "seed": seed}
    (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    script = REPOSITORY / "tests" / "support" / "killed_runs.py"
    done = run_command([sys.executable, str(script), str(folder / "plan.json")])
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["kills"] == kills
    logs = ""
    for chain in map(str, range(result["chains"])):
        run = folder / chain
        assert_ends_like(run, folder / "undisturbed", iteration=STEPS)
        assert iterations(run) == [10, STEPS - 2, STEPS]
        assert [verify(iteration_folder(run, n)) for n in iterations(run)] == [[], [], []]
        logs += (folder / f"{chain}.log").read_text(encoding="utf-8")
    assert "resumed from iteration" in logs, "no kill came after the first save"
    assert "it is not loaded" not in logs, "what a kill leaves is no damaged checkpoint"


@pytest.mark.parametrize("how", ["", "--async-save"])
def test_a_few_kills(tmp_path: Path, how: str):
    check_killed(tmp_path, how, kills=3, seed=11)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["", "--async-save"])
def test_thirty_kills(tmp_path: Path, how: str):
    check_killed(tmp_path, how, kills=30, seed=12)
