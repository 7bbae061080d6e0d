"""Leases on runs, by which workers on one machine or on many share a study without a coordinator.

A lease is a folder `lease-N` in the run's own, for `mkdir` succeeds for one process only, on shared
file systems too. Its owner touches it as long as it lives. One that was not touched for the seconds
that its owner wrote into it, or was given back, is succeeded by `lease-N+1`, and again one process
only can make that; an owner that was merely asleep sees it there, and stops. Nothing is ever
removed or renamed, so there is no moment between two steps that a second worker could fall into.

Times are compared as the file system writes them, not by the clocks of the machines.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

EXPIRY = 120.0  # seconds
BEATS = 6  # in that time
OWNER = "owner.json"
MAY_NOT_WRITE = (errno.EACCES, errno.EPERM, errno.EROFS)
RELEASED = "released"


class Lease:
    """A lease that this process holds; `lost` is set where another one has succeeded it."""

    def __init__(self, path: Path, *, expiry: float) -> None:
        self.path = path
        self.lost = threading.Event()
        self._ended = threading.Event()
        self._interval = expiry / BEATS
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Lease:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            (self.path / RELEASED).touch()

    def _beat(self) -> None:
        while not self._ended.wait(self._interval):
            with contextlib.suppress(OSError):  # a file system may be away for a while
                os.utime(self.path)
            if _numbered(self.path.parent, _number(self.path) + 1).exists():
                self.lost.set()


def take(run: Path, *, expiry: float = EXPIRY) -> Lease | None:
    """Take the run in this folder; None: another worker has it.

    Args:
        expiry: seconds without a sign of this worker after which others may take the run.
    """
    run.mkdir(parents=True, exist_ok=True)
    last = _last(run)
    if last is not None and _is_held(last, expiry=expiry):
        return None
    path = _numbered(run, 0 if last is None else _number(last) + 1)
    try:
        path.mkdir()
    except FileExistsError:  # another worker was first
        return None
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "expiry": expiry}
    (path / OWNER).write_text(json.dumps(owner), encoding="utf-8")
    return Lease(path, expiry=expiry)


def is_held(run: Path, *, expiry: float = EXPIRY) -> bool:
    """Return whether a living worker holds the run.

    Args:
        expiry: of a lease that does not say its own.
    """
    last = _last(run)
    return last is not None and _is_held(last, expiry=expiry)


def host_of(run: Path, *, expiry: float = EXPIRY) -> str | None:
    """Return the machine of the living worker that holds the run; None: nobody does.

    Args:
        expiry: of a lease that does not say its own.
    """
    last = _last(run)
    return _owner(last).get("host") if last is not None and _is_held(last, expiry=expiry) else None


def _is_held(lease: Path, *, expiry: float) -> bool:
    if (lease / RELEASED).exists():
        return False
    return _now(lease.parent) - lease.stat().st_mtime < _expiry_of(lease, default=expiry)


def _expiry_of(lease: Path, *, default: float) -> float:
    """Return the owner's expiry, by which it chose how often it gives a sign; earlier versions did
    not write it."""
    return float(_owner(lease).get("expiry", default))


def _owner(lease: Path) -> dict[str, Any]:
    """Return what the owner wrote of itself; it may not have done so yet."""
    try:
        owner: dict[str, Any] = json.loads((lease / OWNER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return owner


def _now(folder: Path) -> float:
    """Return the file system's time, by touching a file of this process's own; this machine's
    where it may not write, as who looks at the runs of another user."""
    try:
        with _probe(folder) as path:
            path.touch()
            return path.stat().st_mtime
    except OSError as error:
        if error.errno not in MAY_NOT_WRITE:
            raise
        return time.time()


@contextlib.contextmanager
def _probe(folder: Path) -> Iterator[Path]:
    name = f".clock-{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}"
    path = folder / name
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _last(run: Path) -> Path | None:
    return max(run.glob("lease-*"), key=_number, default=None)


def _numbered(run: Path, number: int) -> Path:
    return run / f"lease-{number}"


def _number(lease: Path) -> int:
    return int(lease.name.rpartition("-")[2])
