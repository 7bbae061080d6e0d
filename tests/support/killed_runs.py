"""Stop runs at random moments and start them again, until they end by themselves.

A test calls `run_all(plan.json)` in a fork of a process that has imported everything, which is ten
times as fast as starting Python; each run is a fork of that one. The plan has `flags` (those of
pretrain_smlp.py without --save), `folder`, `stops`, `seed`, `ranks` and `by`: "kill" sends SIGKILL
to one rank or all, then does to the others what torchrun does; "keyboard" is Ctrl-C once or twice
while a checkpoint is written. The folder receives `undisturbed`, then `0`, `1`, ... until they had
`stops` stops in all. Ranks get the environment variables that torchrun sets.
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
from dataclasses import dataclass, field
from pathlib import Path

from support.ranks import free_port

from megatron_smlp.program import readable_errors

SHARE = 0.5  # latest kill: share of the time from an undisturbed run's first save to its end
LONGEST = 120.0  # seconds after which a run counts as hung
PATIENCE = 3.0  # seconds from SIGTERM to SIGKILL for a rank whose neighbour is gone


@dataclass
class Run:
    """The processes of one start, and the exit codes of those that have ended."""

    folder: Path
    waiting: list[int]
    codes: list[int] = field(default_factory=list)

    def collect(self) -> bool:
        """Return whether all have ended."""
        for process in list(self.waiting):
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                self.waiting.remove(process)
                self.codes.append(os.waitstatus_to_exitcode(status))
        return not self.waiting

    def wait(self, seconds: float) -> bool:
        """Return whether all have ended in that time."""
        deadline = time.monotonic() + seconds
        while not self.collect():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.001)
        return True

    def send(self, number: int) -> None:
        """Signal each rank's process group, including background saves, as a terminal does."""
        for process in self.waiting:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process, number)

    def ended_well(self) -> bool:
        return not self.waiting and set(self.codes) == {0}


def start(flags: str, folder: Path, *, ranks: int) -> Run:
    """Start a training that saves into `folder`."""
    port = free_port()
    return Run(folder, [_start_rank(flags, folder, rank, ranks, port) for rank in range(ranks)])


def _start_rank(flags: str, folder: Path, rank: int, ranks: int, port: int) -> int:
    from pretrain_smlp import main

    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.setpgid(0, 0)
        log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if ranks > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        with readable_errors("pretrain_smlp.py"):
            main([*flags.split(), "--save", str(folder)])
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def start_and_see_a_save(flags: str, folder: Path, *, ranks: int) -> Run:
    """Start a training, and return once it has begun to save, or has ended."""
    names = saves(folder)
    run = start(flags, folder, ranks=ranks)
    while saves(folder) <= names and not run.collect():
        time.sleep(0.001)
    return run


def saves(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*iter_*")}


def finish(run: Run) -> None:
    if not run.wait(LONGEST):
        run.send(signal.SIGKILL)
        raise SystemExit("a run hangs: see its .log")
    if not run.ended_well():
        raise SystemExit("a run failed: see its .log")


def kill(run: Run, draw: random.Random) -> None:
    """Kill one rank or all; a background save ends with its rank."""
    doomed = run.waiting if draw.random() < 0.5 else [draw.choice(run.waiting)]
    for process in doomed:
        os.kill(process, signal.SIGKILL)
    time.sleep(draw.uniform(0, 0.05))
    for process in run.waiting:
        os.kill(process, signal.SIGTERM)
    if not run.wait(PATIENCE):
        for process in run.waiting:
            os.kill(process, signal.SIGKILL)
        run.wait(LONGEST)


def interrupt(run: Run, draw: random.Random) -> None:
    """Send Ctrl-C: once, the run ends well, with a checkpoint; twice, at once, with code 130."""
    twice = draw.random() < 0.5
    run.send(signal.SIGINT)
    if twice:
        time.sleep(draw.uniform(0.001, 0.02))
        run.send(signal.SIGINT)
    if not run.wait(LONGEST):
        run.send(signal.SIGKILL)
        raise SystemExit("an interrupted run hangs: see its .log")
    # The second one may come when the first has ended the run, or is about to.
    if not set(run.codes) <= ({0, 128 + signal.SIGINT} if twice else {0}):
        raise SystemExit(f"an interrupted run ended with {run.codes}: see its .log")


def run_all(plan: Path) -> None:
    """Carry out the plan, and print as JSON the numbers of stops and chains and the exit codes."""
    what = json.loads(plan.read_text(encoding="utf-8"))
    folder, flags, ranks = Path(what["folder"]), what["flags"], what["ranks"]
    run = start_and_see_a_save(flags, folder / "undisturbed", ranks=ranks)
    began = time.monotonic()
    finish(run)
    longest = (time.monotonic() - began) * SHARE
    draw = random.Random(what["seed"])
    stop = {"kill": kill, "keyboard": interrupt}[what["by"]]
    stops, chain, codes = 0, 0, []
    while stops < what["stops"]:
        shortest = longest / 3  # so that the first stop loses something
        while stops < what["stops"]:
            run = start_and_see_a_save(flags, folder / str(chain), ranks=ranks)
            if run.wait(draw.uniform(shortest, longest)):
                finish(run)
                break
            if what["by"] == "keyboard":
                see_another_save(run)
            stop(run, draw)
            codes += run.codes
            stops, shortest = stops + 1, 0.0
        else:
            finish(start(flags, folder / str(chain), ranks=ranks))
        chain += 1
    print(json.dumps({"stops": stops, "chains": chain, "codes": sorted(set(codes))}))


def see_another_save(run: Run) -> None:
    """Wait until a checkpoint is being written, or the run has ended."""
    while not run.collect() and not list(run.folder.glob(".iter_*.partial-*/*")):
        time.sleep(0.0005)
