"""Leases on folders: who holds one, until when, and how it is taken over.

`.lease-000007` belongs to the folder's seventh holder: each takes the next number, and the highest
number holds the folder. A number is taken by linking a finished file to a name that must be free,
which even a shared file system allows only one process to do.

Clocks of different machines are not compared. A holder has ended if its process has (if on this
machine), or if the observer, by its own clock, has not seen its heartbeat change for `expiry`. A
holder that was declared dead and comes back sees the higher number: in the background (`lost`), and
by calling `is_held` (the fence) before anything that only one process may do.
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
"""Heartbeats per `expiry`, the time after which a silent holder is declared dead."""
SIZE = 1024
"""Size of a heartbeat file in bytes; each heartbeat rewrites all of it."""


class HeldError(Exception):
    """The folder's holder, named in the message, is alive."""


@dataclass(frozen=True)
class Holder:
    """A process, as described by its heartbeat."""

    token: str
    host: str
    process: int
    kernel: str
    """Identifies the machine's boot and the PID namespace; if they match, the process can be looked
    up."""
    started: str
    """Start time of the process in kernel ticks, since process IDs are reused."""
    expiry: float
    """Seconds without a heartbeat after which it is declared dead."""
    beat: int = 0
    note: Mapping[str, Any] = field(default_factory=dict)
    """What it reports about its work."""
    is_released: bool = False

    @classmethod
    def here(cls, *, expiry: float) -> Holder:
        """Return this process as a holder, with a fresh token."""
        return cls(
            token=secrets.token_hex(8),
            host=socket.gethostname(),
            process=os.getpid(),
            kernel=_kernel(),
            started=_state_and_start(os.getpid())[1],
            expiry=expiry,
        )

    def lives(self) -> bool | None:
        """Return whether its process runs; None if that cannot be seen from here, or if the process
        is stopped, which may or may not continue."""
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
    """Return a process's state letter and start time; empty strings if there is no such process."""
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", ""
    fields = text.rpartition(")")[2].split()
    return fields[0], fields[19]


def read(path: Path) -> Holder | None:
    """Return the holder in a file; None if it is missing or currently unreadable."""
    try:
        return Holder(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


@dataclass
class Sight:
    """What one process has seen of a heartbeat."""

    holder: Holder | None
    """The content when it was last readable."""
    since: float
    """When this content was first seen, by time.monotonic."""
    beats: int = 0
    """How often it was seen to change."""

    def has_ended(self, *, expiry: float) -> bool:
        """Return whether the holder's process has ended or was silent for too long.

        Args:
            expiry: assumed for a holder that could not be read yet.
        """
        expiry = self.holder.expiry if self.holder else expiry
        is_silent = time.monotonic() - self.since > expiry
        return is_silent or (self.holder is not None and self.holder.lives() is False)


class Observer:
    """Remembers when each heartbeat last changed, by this process's own clock."""

    def __init__(self) -> None:
        self._sights: dict[Path, Sight] = {}

    def look(self, path: Path) -> Sight:
        """Read a heartbeat again and return what is known of it."""
        holder, now = read(path), time.monotonic()
        sight = self._sights.setdefault(path, Sight(holder, now))
        if holder and holder != sight.holder:
            sight.beats += sight.holder is not None
            sight.holder, sight.since = holder, now
        return sight

    def is_held(self, folder: Path, *, expiry: float) -> bool:
        """Return whether the folder's holder is alive, as far as was seen.

        Args:
            expiry: assumed for a holder that could not be read yet.
        """
        path = newest(folder)
        return path is not None and not self.look(path).has_ended(expiry=expiry)


class Heartbeat:
    """Shows that this process is alive, by rewriting a file in the background as long as it is.

    The file is rewritten in place, so that a full disk does not stop it.

    Args:
        path: an existing file with the holder's content.
        interval: seconds between heartbeats.
    """

    def __init__(self, path: Path, holder: Holder, *, interval: float) -> None:
        self.path, self.holder, self.interval = path, holder, interval
        self.note: dict[str, Any] = {}
        """Written with the next heartbeat."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(self.interval):
            with contextlib.suppress(OSError):  # the file system may be temporarily unavailable
                self.beat()

    def beat(self, *, is_released: bool = False) -> None:
        """Write the next heartbeat.

        Raises:
            OSError: the file is gone or cannot be written.
        """
        self.holder = replace(
            self.holder, beat=self.holder.beat + 1, note=dict(self.note), is_released=is_released
        )
        with self.path.open("r+b", buffering=0) as file:
            file.write(self.holder.content())

    def end(self) -> None:
        """Stop the heartbeats."""
        self._ended.set()
        self._thread.join()


class Lease(Heartbeat):
    """A folder held by this process until it is released or another process takes it over."""

    def __init__(self, path: Path, holder: Holder, before: Holder | None, silent: float) -> None:
        self.folder, self.number = path.parent, _number(path)
        self.before, self.silent = before, silent
        """The last holder, and the seconds since its last heartbeat, by the file system's clock."""
        self.lost = threading.Event()
        """Set once this process has seen another holder."""
        super().__init__(path, holder, interval=holder.expiry / BEATS)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def beat(self, *, is_released: bool = False) -> None:
        """Write the next heartbeat, unless there is another holder."""
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
        """Let the next holder take the folder at once; `note` stays in the file."""
        self.end()
        with contextlib.suppress(OSError):
            self.beat(is_released=True)


def take(folder: Path, *, expiry: float, observer: Observer) -> Lease | None:
    """Take a folder; return None if another process holds it, as far as was seen.

    Args:
        folder: an existing folder.
        expiry: seconds without a heartbeat after which others may take it over.
        observer: the same one each time that a process tries again.

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
    if newest(folder) != path:  # others were ahead by more than one and have removed this number
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
        say: called once if the holder must be watched to tell whether it is alive.
        patience: seconds that a live holder is given to end.

    Raises:
        HeldError: the holder is alive.
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
                say(f"{folder} was last held by {sight.holder}: is it still alive?")
                has_said = True
        time.sleep(min(0.2, expiry / 10))
    return lease


def holder_of(folder: Path) -> Holder | None:
    """Return who seems to hold a folder, at one look, for display only: a holder on another machine
    is judged by its file's modification time and this machine's clock."""
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
    """Create a lease; return whether this process got the name."""
    own = path.with_name(f".lease.{holder.token}")
    write_durably(own, holder.content())
    try:
        path.hardlink_to(own)
    except FileExistsError:
        made = read(path)  # ours, if NFS lost the reply to a first attempt
        return made is not None and made.token == holder.token
    except OSError:  # a file system without hard links
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
