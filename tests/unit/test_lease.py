"""A folder has one holder, whatever dies, freezes or comes back, and whatever clocks say."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.launches import REPOSITORY

from megatron_smlp import lease as leases
from megatron_smlp.lease import Heartbeat, HeldError, Holder, Lease, Observer, acquire, holder_of

LONG = 600.0  # seconds: a busy machine may delay any process
SHORT = 0.5

# Holds a folder until a line arrives on stdin, then prints whether it still does.
HOLDER = """
import sys
from pathlib import Path
from megatron_smlp.lease import Observer, take
lease = take(Path(sys.argv[1]), expiry=float(sys.argv[2]), observer=Observer())
print(lease.number, flush=True)
sys.stdin.readline()
print(lease.is_held(), lease.lost.is_set(), flush=True)
"""
# Takes a folder the given number of times; no other process may be in it meanwhile.
WORKER = """
import sys, time
from pathlib import Path
from megatron_smlp.lease import Observer, take
folder, turns, observer = Path(sys.argv[1]), int(sys.argv[2]), Observer()
while turns:
    lease = take(folder, expiry=600, observer=observer)
    if lease is not None:
        with lease:
            inside = (folder / "inside").open("x")
            time.sleep(0.001)
            (folder / "inside").unlink()
            assert lease.is_held()
        turns -= 1
"""


def take(folder: Path, *, expiry: float = LONG, observer: Observer | None = None) -> Lease | None:
    return leases.take(folder, expiry=expiry, observer=observer or Observer())


def held(folder: Path, *, expiry: float = LONG) -> Lease:
    lease = take(folder, expiry=expiry)
    assert lease is not None
    return lease


def process(code: str, *arguments: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


@contextmanager
def holder(folder: Path, *, expiry: float) -> Iterator[subprocess.Popen[str]]:
    """Start another process that holds a folder."""
    with process(HOLDER, folder, expiry) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "1\n"
        try:
            yield other
        finally:
            other.kill()


def elsewhere(folder: Path, **changes: Any) -> Path:
    """Make the newest lease belong to another machine, whose processes cannot be seen."""
    path = max(folder.glob(".lease-*"))
    other = {"kernel": "another", "host": "node7", "process": 4711, "is_released": False}
    content = json.loads(path.read_text()) | other | changes
    path.write_bytes(Holder(**content).content())
    return path


def test_holders_are_counted_and_leave_a_note(tmp_path: Path):
    first = held(tmp_path)
    assert (first.number, first.before) == (1, None)
    first.note = {"iteration": 12}
    first.release()
    second = held(tmp_path)
    assert second.number == 2
    assert second.before is not None
    assert second.before.note == {"iteration": 12}
    assert 0 <= second.silent < 60
    assert [path.name for path in tmp_path.iterdir()] == [".lease-000002"]


def test_a_holder_keeps_others_out_until_it_gives_the_folder_back(tmp_path: Path):
    observer = Observer()
    with held(tmp_path) as lease:
        assert lease.is_held()
        assert take(tmp_path, observer=observer) is None
        assert observer.is_held(tmp_path, expiry=LONG)
        with pytest.raises(HeldError, match=f"process {os.getpid()} on "):
            acquire(tmp_path, expiry=LONG)
    assert not observer.is_held(tmp_path, expiry=LONG)
    assert take(tmp_path, observer=observer)


def test_of_many_processes_one_holds_a_folder_at_a_time(tmp_path: Path):
    workers = [process(WORKER, tmp_path, 25) for _ in range(4)]
    assert [worker.wait(120) for worker in workers] == [0] * 4
    assert [path.name for path in tmp_path.iterdir()] == [".lease-000100"]


def test_a_killed_process_of_this_machine_is_not_waited_for(tmp_path: Path):
    with holder(tmp_path, expiry=LONG) as other:
        assert take(tmp_path) is None
        other.kill()
        other.wait()
        assert acquire(tmp_path, expiry=LONG).number == 2


def test_a_process_number_that_came_again_is_not_the_holder(tmp_path: Path):
    held(tmp_path).release()
    elsewhere(tmp_path, kernel=leases._kernel(), process=os.getpid(), started="1")
    assert take(tmp_path)


def test_a_frozen_process_expires_and_is_told_when_it_goes_on(tmp_path: Path):
    with holder(tmp_path, expiry=2.0) as other:
        os.kill(other.pid, signal.SIGSTOP)
        while leases._state_and_start(other.pid)[0] != "T":
            time.sleep(0.01)
        began = time.monotonic()
        lease = acquire(tmp_path, expiry=2.0)
        assert time.monotonic() - began >= 2.0
        os.kill(other.pid, signal.SIGCONT)
        output, _ = other.communicate("\n", timeout=60)
        assert output == "False True\n"
        assert lease.is_held()


def test_a_silent_holder_elsewhere_expires_when_it_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The holder's own expiry counts, not the observer's."""
    held(tmp_path).release()
    elsewhere(tmp_path, expiry=SHORT)
    began = time.monotonic()
    assert acquire(tmp_path, expiry=LONG).number == 2
    assert time.monotonic() - began >= SHORT
    assert (
        capsys.readouterr().out.count("last held by process 4711 on node7: is it still alive") == 1
    )
    elsewhere(tmp_path, expiry=LONG)
    observer = Observer()
    assert take(tmp_path, expiry=0.01, observer=observer) is None
    time.sleep(0.05)
    assert take(tmp_path, expiry=0.01, observer=observer) is None


def test_a_holder_elsewhere_that_beats_lives_whatever_its_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with holder(tmp_path, expiry=2.0):
        monkeypatch.setattr(leases, "_kernel", lambda: "another")
        os.utime(tmp_path / ".lease-000001", (0, 0))
        with pytest.raises(HeldError):
            acquire(tmp_path, expiry=LONG)
        observer, deadline = Observer(), time.monotonic() + 3.0
        while time.monotonic() < deadline:
            assert take(tmp_path, observer=observer) is None
            time.sleep(0.1)
        assert observer.look(tmp_path / ".lease-000001").beats > 1


def test_a_holder_that_is_about_to_end_may_be_waited_for(tmp_path: Path):
    """Such as old ranks of a run that is started again, which are cut off from it."""
    held(tmp_path).release()
    elsewhere(tmp_path)

    def beat_and_end() -> None:
        for beat in range(4):
            time.sleep(0.4)
            elsewhere(tmp_path, beat=beat, is_released=beat == 3)

    with ThreadPoolExecutor(1) as node7:
        node7.submit(beat_and_end)
        assert acquire(tmp_path, expiry=LONG, patience=60).number == 2


def test_a_lease_that_cannot_be_read_now_is_nobodys_death(tmp_path: Path):
    held(tmp_path).release()
    elsewhere(tmp_path).write_bytes(b"")

    def come_back() -> None:
        for beat in (1, 2, 3):
            time.sleep(0.5)
            content = Holder("t", "node7", 4711, "another", "1", LONG, beat=beat).content()
            (tmp_path / ".lease-000001").write_bytes(content)

    held_by = pytest.raises(HeldError, match="process 4711 on node7")
    with ThreadPoolExecutor(1) as node7, held_by:
        node7.submit(come_back)
        acquire(tmp_path, expiry=30.0)


def test_one_that_was_taken_over_notices_and_leaves_the_successor_alone(tmp_path: Path):
    old = held(tmp_path, expiry=SHORT)
    (tmp_path / ".lease-000002").write_bytes(Holder.here(expiry=LONG).content())
    assert old.lost.wait(10)
    assert not old.is_held()
    assert old.successor()[0] == 2
    old.release()
    assert not json.loads((tmp_path / ".lease-000002").read_text())["is_released"]


def test_who_links_a_number_that_others_have_left_behind_has_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Between its look and its link two others came, and the second removed the first's lease."""
    held(tmp_path).release()
    create = leases._create

    def late(path: Path, own: Holder) -> bool:
        monkeypatch.setattr(leases, "_create", create)
        held(tmp_path).release()
        held(tmp_path)
        return create(path, own)

    monkeypatch.setattr(leases, "_create", late)
    assert take(tmp_path) is None
    assert [path.name for path in tmp_path.iterdir()] == [".lease-000003"]


@pytest.mark.parametrize("links", ["none", "whose answer is lost"])
def test_file_systems_with_other_links(tmp_path: Path, links: str, monkeypatch: pytest.MonkeyPatch):
    """No hard links at all; or NFS, where the reply is lost and the retry finds the link made."""
    link = Path.hardlink_to

    def hardlink_to(self: Path, target: Path) -> None:
        if links == "none":
            raise PermissionError
        link(self, target)
        raise FileExistsError

    monkeypatch.setattr(Path, "hardlink_to", hardlink_to)
    path = held(tmp_path).path
    assert not leases._create(path, Holder.here(expiry=LONG))
    assert take(tmp_path) is None


def test_a_heartbeat_needs_no_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, own = tmp_path / "here", Holder.here(expiry=LONG)
    path.write_bytes(own.content())
    heartbeat = Heartbeat(path, own, interval=0.01)

    def beats() -> int:
        return int(json.loads(path.read_text())["beat"])

    before, file = beats(), path.stat()
    while beats() < before + 3:
        time.sleep(0.01)
    heartbeat.end()
    assert (path.stat().st_ino, path.stat().st_size) == (file.st_ino, file.st_size)


def test_a_folder_that_is_gone(tmp_path: Path):
    folder = tmp_path / "run"
    folder.mkdir()
    lease = held(folder)
    folder.rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError):
        lease.is_held()
    lease.release()
    assert not folder.exists()


def test_who_seems_to_hold_a_folder(tmp_path: Path):
    """With a single look, as `study.py status` takes."""
    assert holder_of(tmp_path / "absent") is None
    assert holder_of(tmp_path) is None
    with held(tmp_path):
        shown = holder_of(tmp_path)
        assert shown is not None
        assert shown.process == os.getpid()
    assert holder_of(tmp_path) is None
    path = elsewhere(tmp_path, expiry=60.0)
    assert holder_of(tmp_path)
    os.utime(path, (time.time() - 90, time.time() - 90))
    assert holder_of(tmp_path) is None
