"""Runs that are killed at random moments and started again, until they end by themselves.

    python tests/support/killed_runs.py plan.json

The plan has `words` (flags of pretrain_smlp.py without --save), `folder`, `kills` and `seed`. Into
the folder come `undisturbed`, then `0`, `1`, ... until there were so many kills in all of them.
Each run is a fork of this process, which has imported everything: that is ten times as fast.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from megatron_smlp.platform.late_compile import late_compile

with late_compile():
    import megatron.training  # noqa: F401

    import megatron_smlp.arguments
    import megatron_smlp.model
    import megatron_smlp.platform.checkpointing
    import megatron_smlp.training.reporting  # noqa: F401

from pretrain_smlp import main

SHARE = 0.5  # of the time from an undisturbed run's first save to its end: the latest kill


def start(words: str, folder: Path) -> int:
    """The id of a process that trains into `folder`."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        with contextlib.suppress(SystemExit):
            main([*words.split(), "--save", str(folder)])
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def start_and_see_a_save(words: str, folder: Path) -> int:
    """The same, once it has begun to save, or has ended."""
    names = saves(folder)
    process = start(words, folder)
    while saves(folder) <= names and not has_ended(process):
        time.sleep(0.001)
    return process


def saves(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*iter_*")}


def has_ended(process: int) -> bool:
    return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def ended(process: int, *, within: float | None) -> bool:
    """Whether it ended by itself; otherwise it is killed, and its background save is an orphan."""
    deadline = time.monotonic() + (within or 120)
    while time.monotonic() < deadline:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            if os.waitstatus_to_exitcode(status):
                raise SystemExit("a run failed: see its .log")
            return True
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    if within is None:
        raise SystemExit("a run hangs: see its .log")
    return False


def run_all(plan: Path) -> None:
    what = json.loads(plan.read_text(encoding="utf-8"))
    folder, words = Path(what["folder"]), what["words"]
    process = start_and_see_a_save(words, folder / "undisturbed")
    began = time.monotonic()
    ended(process, within=None)
    longest = (time.monotonic() - began) * SHARE
    draw = random.Random(what["seed"])
    kills, chain = 0, 0
    while kills < what["kills"]:
        shortest = longest / 3  # the first kill has something to lose
        while kills < what["kills"]:
            process = start_and_see_a_save(words, folder / str(chain))
            if ended(process, within=draw.uniform(shortest, longest)):
                break
            kills, shortest = kills + 1, 0.0
        else:
            ended(start(words, folder / str(chain)), within=None)
        chain += 1
    print(json.dumps({"kills": kills, "chains": chain}))


if __name__ == "__main__":
    run_all(Path(sys.argv[1]))
