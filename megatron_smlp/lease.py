"""Who holds a folder, until when, and how it is taken over: a number, a heartbeat and a fence.

`.lease-000007` belongs to the folder's seventh holder: each takes the next number, and the highest
holds the folder. A number is taken by linking a finished file to a name that must be free, which
even a shared file system lets only one process do.

No clocks are compared, which differ between machines. A holder has ended if its process has, where
that is on this machine, or if its heartbeat was not seen to change for its `expiry`, by the clock
of who looks. One that was taken for dead and comes back sees the higher number: in the background
(`lost`), and by `is_held` before anything that only one process may do.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_smlp.durable import write_durably

NAME = re.compile(r"\.lease-(\d{6,})")
BEATS = 9
"""Heartbeats in the time after which a holder is taken for dead."""
SIZE = 1024
"""Bytes of a heartbeat's file, of which each one rewrites all."""


class HeldError(Exception):
    """The folder's holder, whom the error names, lives."""


@dataclass(frozen=True)
class Holder:
    """A process, as its heartbeat describes it."""

    token: str
    host: str
    process: int
    kernel: str
    """Identifies the machine's boot and the process namespace; where it is the same, the process
    can be looked up."""
    started: str
    """When the process was started, in the kernel's ticks: process ids are reused."""
    expiry: float
    """Seconds without a heartbeat after which it is taken for dead."""
    beat: int = 0
    note: Mapping[str, Any] = field(default_factory=dict)
    """What it says of its work."""
    is_released: bool = False

    @classmethod
    def here(cls, *, expiry: float) -> Holder:
        """Return this process as a holder, with a token of its own."""
        return cls(
            token=secrets.token_hex(8),
            host=socket.gethostname(),
            process=os.getpid(),
            kernel=_kernel(),
            started=_state_and_start(os.getpid())[1],
            expiry=expiry,
        )

    def lives(self) -> bool | None:
        """Return whether its process runs; None where that cannot be seen from here, and for one
        that is stopped, which may go on or not."""
        if self.is_released:
            return False
        if not self.kernel or self.kernel != _kernel():
            return None
        state, started = _state_and_start(self.process)
        if state in "ZX" or started != self.started:
            return False
        return None if state in "Tt" else True

    def content(self) -> bytes:
        return json.dumps(asdict(self)).encode().ljust(SIZE) + b"\n"

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}"


def _kernel() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _state_and_start(process: int) -> tuple[str, str]:
    """Return the letter of a process's state, and when it was started; empty if there is none."""
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", ""
    fields = text.rpartition(")")[2].split()
    return fields[0], fields[19]


def read(path: Path) -> Holder | None:
    """Return the holder in a file; None if it is missing or cannot be read now."""
    try:
        return Holder(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


@dataclass
class Sight:
    """What one process has seen of a heartbeat."""

    holder: Holder | None
    """As of the last time that it could be read."""
    since: float
    """When it was first seen like this, by time.monotonic."""
    beats: int = 0
    """How often it was seen to change."""

    def has_ended(self, *, expiry: float) -> bool:
        """Return whether the holder's process has ended, or was silent for too long.

        Args:
            expiry: of one that could not be read yet.
        """
        expiry = self.holder.expiry if self.holder else expiry
        is_silent = time.monotonic() - self.since > expiry
        return is_silent or (self.holder is not None and self.holder.lives() is False)


class Observer:
    """Remembers since when heartbeats are as they are, by this process's own clock."""

    def __init__(self) -> None:
        self._sights: dict[Path, Sight] = {}

    def look(self, path: Path) -> Sight:
        """Look at a heartbeat once more."""
        holder, now = read(path), time.monotonic()
        sight = self._sights.setdefault(path, Sight(holder, now))
        if holder and holder != sight.holder:
            sight.beats += sight.holder is not None
            sight.holder, sight.since = holder, now
        return sight

    def is_held(self, folder: Path, *, expiry: float) -> bool:
        """Return whether a holder of the folder lives, as far as was seen.

        Args:
            expiry: of one that could not be read yet.
        """
        path = newest(folder)
        return path is not None and not self.look(path).has_ended(expiry=expiry)


class Heartbeat:
    """Shows that this process lives, by rewriting a file in the background for as long as it does.

    In place, so that a full disk does not stop it.

    Args:
        path: of a file with the holder's content.
        interval: seconds.
    """

    def __init__(self, path: Path, holder: Holder, *, interval: float) -> None:
        self.path, self.holder, self.interval = path, holder, interval
        self.note: dict[str, Any] = {}
        """Is written with the next heartbeat."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(self.interval):
            with contextlib.suppress(OSError):  # a file system may be away for a while
                self.beat()

    def beat(self, *, is_released: bool = False) -> None:
        """Write the file once more.

        Raises:
            OSError: it is gone, or cannot be written.
        """
        self.holder = replace(
            self.holder, beat=self.holder.beat + 1, note=dict(self.note), is_released=is_released
        )
        with self.path.open("r+b", buffering=0) as file:
            file.write(self.holder.content())

    def end(self) -> None:
        """Write it no more."""
        self._ended.set()
        self._thread.join()


class Lease(Heartbeat):
    """A folder that this process holds, until it is released or another one takes it over."""

    def __init__(self, path: Path, holder: Holder, before: Holder | None, silent: float) -> None:
        self.folder, self.number = path.parent, _number(path)
        self.before, self.silent = before, silent
        """The last holder, and the seconds since its last heartbeat, by the file system's clock."""
        self.lost = threading.Event()
        """Is set when this process has seen another holder."""
        super().__init__(path, holder, interval=holder.expiry / BEATS)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def beat(self, *, is_released: bool = False) -> None:
        """Write the file once more, unless there is another holder."""
        if self.is_held():
            super().beat(is_released=is_released)

    def is_held(self) -> bool:
        """Return whether this process still holds the folder.

        Raises:
            OSError: the folder is gone.
        """
        if not self.lost.is_set():
            holder = read(self.path)
            is_own = holder is None or holder.token == self.holder.token
            if newest(self.folder) != self.path or not is_own:
                self.lost.set()
                self._ended.set()
        return not self.lost.is_set()

    def successor(self) -> tuple[int, Holder | None]:
        """Return the number of the highest lease, and its holder."""
        path = newest(self.folder)
        return (_number(path), read(path)) if path else (0, None)

    def release(self) -> None:
        """Let the next holder have the folder at once; `note` stays in it."""
        self.end()
        with contextlib.suppress(OSError):
            self.beat(is_released=True)


def take(folder: Path, *, expiry: float, observer: Observer) -> Lease | None:
    """Take a folder; None: another process holds it, as far as was seen.

    Args:
        folder: exists.
        expiry: seconds without a heartbeat after which others may take it over.
        observer: of a process that tries again, the same one.

    Raises:
        OSError: no lease can be written there.
    """
    last = newest(folder)
    if last and not observer.look(last).has_ended(expiry=expiry):
        return None
    number = _number(last) if last else 0
    path, holder = folder / f".lease-{number + 1:06d}", Holder.here(expiry=expiry)
    before = read(last) if last else None
    if not _create(path, holder):
        return None
    if newest(folder) != path:  # others were faster by more than one, and have removed this number
        path.unlink(missing_ok=True)
        return None
    silent = _seconds_between(last, path) if last else 0.0
    for old in _leases(folder):
        if _number(old) <= number:
            old.unlink(missing_ok=True)
    return Lease(path, holder, before, silent)


def acquire(
    folder: Path, *, expiry: float, say: Callable[[str], None] = print, patience: float = 0.0
) -> Lease:
    """Take a folder, as `take` does, as soon as its holder has ended.

    Args:
        say: is told of a holder that has to be watched, once.
        patience: seconds in which a holder that lives may end.

    Raises:
        HeldError: it lives.
        OSError: no lease can be written there.
    """
    observer, gives_up = Observer(), time.monotonic() + patience
    has_said, seen = False, 0
    while (lease := take(folder, expiry=expiry, observer=observer)) is None:
        path = newest(folder)
        sight = observer.look(path) if path else None
        if sight and sight.holder:
            lives = sight.holder.lives()
            has_beaten, seen = sight.beats > seen, sight.beats
            if (lives or has_beaten) and time.monotonic() > gives_up:
                raise HeldError(str(sight.holder))
            if lives is None and not has_said:
                say(f"{folder} was last held by {sight.holder}: is it still at work?")
                has_said = True
        time.sleep(min(0.2, expiry / 10))
    return lease


def holder_of(folder: Path) -> Holder | None:
    """Return who seems to hold a folder, at one look, for who only shows it: a holder on another
    machine is judged by its file's time and this machine's clock."""
    path = newest(folder) if folder.is_dir() else None
    holder = read(path) if path else None
    if path is None or holder is None:
        return None
    lives = holder.lives()
    if lives is None:
        lives = time.time() - path.stat().st_mtime < holder.expiry
    return holder if lives else None


def newest(folder: Path) -> Path | None:
    """Return the lease with the highest number."""
    return max(_leases(folder), key=_number, default=None)


def _leases(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if NAME.fullmatch(path.name)]


def _number(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _create(path: Path, holder: Holder) -> bool:
    """Return whether nobody else had the name."""
    own = path.with_name(f".lease.{holder.token}")
    write_durably(own, holder.content())
    try:
        path.hardlink_to(own)
    except FileExistsError:
        made = read(path)  # by this process, where NFS has lost the answer to a first try
        return made is not None and made.token == holder.token
    except OSError:  # a file system without links
        try:
            with path.open("xb") as file:
                file.write(holder.content())
        except FileExistsError:
            return False
    finally:
        own.unlink(missing_ok=True)
    return True


def _seconds_between(last: Path, new: Path) -> float:
    try:
        return max(0.0, new.stat().st_mtime - last.stat().st_mtime)
    except OSError:
        return 0.0
