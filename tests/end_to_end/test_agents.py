"""Launchers, agents and torchrun's rendezvous, with ranks that do nothing but end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.launches import REPOSITORY, clean_environment
from support.living import children_of, lives
from support.ranks import free_port

from megatron_smlp.launching.exit_codes import MISSING

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

RANK = """
import os, signal, sys, time
from pathlib import Path

folder, role = Path(__file__).parent, os.environ["ROLE"]

def note(what):
    with (folder / "events").open("a") as events:
        events.write(f"{what} {os.environ['RANK']}\\n")

def end(*_):
    note("told")
    sys.exit(0)

signal.signal(signal.SIGTERM, end)
note("starts")
rank, tries = int(os.environ["RANK"]), (folder / "events").read_text().count("starts 1")
if role == "late":  # the first machine's takes longer than torch waits for a heartbeat
    time.sleep(35 if rank == 0 else 5)
elif role == "crash":  # the second one's fails, once, when the first one's has ended
    while rank == 1 and "ends 0" not in (folder / "events").read_text():
        time.sleep(0.5)
    if rank == 1 and tries == 1:
        time.sleep(5)
        os.kill(os.getpid(), signal.SIGSEGV)
elif role == "sick":  # those of one machine always fail, here once a spare waits
    while not (spare := folder / "log2").exists() or "a spare" not in spare.read_text():
        time.sleep(0.5)
    if os.environ["NODE_RANK"] == "1":
        time.sleep(3)  # as an import takes; whoever waits is a spare by then
        sys.exit(1)
    time.sleep(20)
else:
    time.sleep(300)
note("ends")
"""


class Machines:
    """Launchers on this machine that act as several machines."""

    def __init__(self, folder: Path, role: str, *, count: int, **variables: str) -> None:
        self.folder = folder
        (folder / "rank.py").write_text(RANK)
        (folder / "save").mkdir()
        shared = {"NNODES": "2", "NPROC_PER_NODE": "1", "MASTER_ADDR": "127.0.0.1", "ROLE": role}
        shared |= {"MASTER_PORT": str(free_port()), "REJOIN_TIMEOUT": "60", **variables}
        script = str(REPOSITORY / "tools" / "launch.py")
        self.argv = [sys.executable, script, "several-nodes", str(folder / "rank.py")]
        self.argv += ["--save", str(folder / "save")]
        self.shared, self.launchers = shared, []
        for _ in range(count):
            self.start()

    def start(self) -> None:
        number = len(self.launchers)
        self.launchers += [
            subprocess.Popen(
                self.argv,
                env=clean_environment(**self.shared, NODE_RANK=str(number)),
                stdout=(self.folder / f"log{number}").open("w"),
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        ]

    @property
    def events(self) -> list[str]:
        file = self.folder / "events"
        return file.read_text().splitlines() if file.exists() else []

    def wait_for(self, condition: Callable[[], bool], *, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.2)

    def codes(self) -> list[int]:
        return [launcher.wait(timeout=200) for launcher in self.launchers]

    def logs(self) -> str:
        said = (self.folder / f"log{number}" for number in range(len(self.launchers)))
        return "\n".join([*self.events, *(file.read_text()[-3000:] for file in said)])

    def __enter__(self) -> Machines:
        return self

    def __exit__(self, *_: object) -> None:
        for launcher in self.launchers:
            if launcher.poll() is None:
                os.killpg(launcher.pid, signal.SIGTERM)
                launcher.wait(timeout=60)


def test_a_machine_whose_ranks_end_late_is_no_reason_for_a_restart(tmp_path: Path):
    """The other machine waits and is not considered gone; the spare is not needed."""
    with Machines(tmp_path, "late", count=3, SPARES="1") as machines:
        assert machines.codes() == [0, 0, 0], machines.logs()
    assert sorted(machines.events) == ["ends 0", "ends 1", "starts 0", "starts 1"]


def test_a_rank_that_fails_when_others_have_ended(tmp_path: Path):
    """All restart and end; no rank waits for five minutes."""
    began = time.monotonic()
    with Machines(tmp_path, "crash", count=2) as machines:
        assert machines.codes() == [0, 0], machines.logs()
    assert time.monotonic() - began < 280  # less than torch's barrier waits
    assert machines.events.count("ends 0") == 2
    assert machines.events.count("ends 1") == 1


def test_a_spare_replaces_a_machine_whose_ranks_always_fail(tmp_path: Path):
    with Machines(tmp_path, "sick", count=2, SPARES="1") as machines:
        machines.wait_for(lambda: len(machines.events) == 2, seconds=120)
        machines.start()
        first, sick, spare = machines.codes()
        assert (first, spare) == (0, 0), machines.logs()
        assert sick in (0, MISSING)  # with 0 it waited as a spare itself
    assert 1 < machines.events.count("starts 1") < 8  # each failure restarts once


def test_an_agent_ends_whose_launcher_was_killed_as_it_started(tmp_path: Path):
    with Machines(tmp_path, "wait", count=1, NNODES="1") as machines:
        (launcher,) = machines.launchers
        machines.wait_for(lambda: bool(children_of(launcher.pid)), seconds=120)
        agent = children_of(launcher.pid)[0]
        launcher.kill()
        launcher.wait()
        machines.wait_for(lambda: not lives(agent), seconds=30)
    assert not machines.events
