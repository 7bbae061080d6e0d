"""Leases, with workers that are killed as the system kills them."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.living import lives

from megatron_smlp.study import leases

EXPIRY = 600.0  # longer than a busy machine lets anybody wait
# Takes every run of a folder: holds its lease for a moment, then writes who made it.
WORKER = """
import os, sys, time
from pathlib import Path
from megatron_smlp.study import leases
folder, expiry, hold = Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
while left := [run for run in sorted(folder.iterdir()) if not (run / "done").exists()]:
    for run in left:
        lease = leases.take(run, expiry=expiry)
        if lease is None:
            continue
        with lease:
            if not (run / "done").exists():
                with (run / "log").open("a") as log:
                    log.write(f"{os.getpid()}\\n")
                time.sleep(hold)
                (run / "done").write_text(str(os.getpid()))
    time.sleep(0.05)
"""


def start(folder: Path, *, hold: float) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", WORKER, str(folder), str(EXPIRY), str(hold)])


def wait_for(path: Path) -> None:
    """Until its line is written: it is there before that."""
    end = time.monotonic() + 60
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < end, f"{path} never came"
        time.sleep(0.02)


def runs(folder: Path, count: int) -> list[Path]:
    made = [folder / f"run-{number}" for number in range(count)]
    for run in made:
        run.mkdir(parents=True)
    return made


def test_two_workers_make_every_run_once(tmp_path: Path):
    made = runs(tmp_path, 12)
    workers = [start(tmp_path, hold=0.1) for _ in range(2)]
    assert [worker.wait(60) for worker in workers] == [0, 0]
    logs = [(run / "log").read_text().split() for run in made]
    assert all(len(log) == 1 for log in logs)


def test_runs_of_killed_workers_are_made_by_others(tmp_path: Path):
    first, second = runs(tmp_path, 2)
    workers = [start(tmp_path, hold=600) for _ in range(2)]
    for run in (first, second):
        wait_for(run / "log")
    for worker in workers:
        worker.send_signal(signal.SIGKILL)
        worker.wait()
    assert leases.take(first, expiry=EXPIRY) is None, "not before the lease expires"
    for run in (first, second):
        _touched_before(run / "lease-0", seconds=2 * EXPIRY)
    heirs = [start(tmp_path, hold=0.1) for _ in range(2)]
    assert [heir.wait(60) for heir in heirs] == [0, 0]
    for run in (first, second):
        dead, heir = (run / "log").read_text().split()
        assert (run / "done").read_text() == heir != dead


def test_a_lease_that_is_given_back_is_free_at_once(tmp_path: Path):
    with leases.take(tmp_path):
        assert leases.take(tmp_path) is None
        assert leases.is_held(tmp_path)
    assert not leases.is_held(tmp_path)
    assert leases.take(tmp_path) is not None


def test_an_owner_that_lives_keeps_its_lease(tmp_path: Path):
    """It touches it again, several times in the time after which others may take it."""
    with leases.take(tmp_path, expiry=0.6) as lease:
        assert lease._interval < 0.6 / 2
        (lease.path / "owner.json").write_text(f'{{"expiry": {EXPIRY}}}')
        _touched_before(lease.path, seconds=2 * EXPIRY)
        end = time.monotonic() + 60
        while not leases.is_held(tmp_path):
            assert time.monotonic() < end, "it was never touched"
            time.sleep(0.02)
        assert leases.take(tmp_path) is None
        assert not lease.lost.is_set()


def test_a_lease_expires_as_its_owner_says(tmp_path: Path):
    """A worker of a shorter expiry does not take what its owner touches less often than that."""
    lease = leases.take(tmp_path, expiry=60)
    assert lease is not None
    _touched_before(lease.path, seconds=30)
    assert leases.is_held(tmp_path, expiry=3)
    assert leases.take(tmp_path, expiry=3) is None
    _touched_before(lease.path, seconds=90)
    assert not leases.is_held(tmp_path, expiry=600)
    assert leases.take(tmp_path, expiry=600) is not None


@pytest.mark.parametrize("owner", [None, "", '{"host": "node", "pid": 7}'])
def test_a_lease_that_does_not_say_expires_as_the_other_worker_says(
    tmp_path: Path, owner: str | None
):
    lease = leases.take(tmp_path, expiry=60)
    assert lease is not None
    (lease.path / "owner.json").unlink()
    if owner is not None:
        (lease.path / "owner.json").write_text(owner)
    _touched_before(lease.path, seconds=30)
    assert leases.take(tmp_path, expiry=45) is None
    assert leases.take(tmp_path, expiry=3) is not None


def _touched_before(lease: Path, *, seconds: float) -> None:
    now = lease.stat().st_mtime
    os.utime(lease, (now - seconds, now - seconds))


@pytest.mark.parametrize("kind", [errno.EACCES, errno.EROFS])
def test_who_may_not_write_can_still_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: int
):
    """As `study.py status` on the runs of another user; the superuser may always, so it is told."""
    held, free = runs(tmp_path, 2)
    with leases.take(held), leases.take(free) as ended:

        def refuse(path: Path, *_: object, **__: object) -> None:
            raise OSError(kind, os.strerror(kind), str(path))

        _touched_before(ended.path, seconds=10 * leases.EXPIRY)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "touch", refuse)
            assert leases.is_held(held)
            assert not leases.is_held(free)


def test_an_owner_that_slept_notices_its_successor(tmp_path: Path):
    with leases.take(tmp_path, expiry=0.6) as lease:
        (tmp_path / "lease-1").mkdir()  # as a worker does that found it expired
        assert lease.lost.wait(10)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell a child")
def test_a_training_ends_with_its_worker(tmp_path: Path):
    code = (
        "import sys, threading; from pathlib import Path;"
        "from megatron_smlp.study.process import run_command;"
        "run_command(['sh', '-c', 'echo $$ > pid; exec sleep 600'], folder=Path('.'),"
        " stop=threading.Event(), watch=lambda: None)"
    )
    worker = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    wait_for(tmp_path / "pid")
    time.sleep(0.2)
    child = int((tmp_path / "pid").read_text())
    worker.kill()
    worker.wait()
    end = time.monotonic() + 30
    while lives(child) and time.monotonic() < end:
        time.sleep(0.05)
    assert not lives(child)
