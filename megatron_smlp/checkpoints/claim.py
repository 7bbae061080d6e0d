"""One writer in a folder of checkpoints: a claim with a number, a heartbeat, and a fence.

`.writer-000007` is held by the first rank of the folder's seventh attempt: each attempt takes the
next number, and the highest owns the folder. A number is taken by linking a finished file to a name
that must be free, which even a shared file system lets only one process do.

Whether another owner is alive is not judged by clocks, which differ between machines, but by its
process, where that is on this machine, and else by watching its heartbeat for LIFETIME.

An owner that was taken for dead and comes back is refused: `check` is called before each rename
that publishes something. A new owner first takes its number and then removes the unfinished folders
that it finds (folders.tidy): a rename of the old owner's fails after that, and is seen before it.
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
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron_smlp.durable import write_durably
from megatron_smlp.errors import TakenOverError, UsageError

NAME = re.compile(r"\.writer-(\d{6,})")
DONE, FAILED = "done", "failed"
INTERVAL = 5.0
"""Seconds between heartbeats."""
LIFETIME = 45.0
"""Seconds without one after which an owner is taken for dead."""


@dataclass(frozen=True)
class Owner:
    """The contents of a claim."""

    token: str
    host: str
    process: int
    kernel: str
    """Identifies the machine's boot and the process namespace; where it is the same, the owner's
    process can be looked up."""
    started: str
    """When the process was started, in the kernel's ticks: process ids are reused."""
    beat: int = 0
    iteration: int = 0
    """The last iteration that was trained, as of this beat."""
    outcome: str = ""
    """How it ended, DONE or FAILED; empty while it has not."""

    @classmethod
    def here(cls) -> Owner:
        """Return this process as an owner, with a token of its own."""
        process = os.getpid()
        return cls(
            token=secrets.token_hex(8),
            host=socket.gethostname(),
            process=process,
            kernel=_kernel(),
            started=_start_ticks(process),
        )

    def is_gone(self) -> bool | None:
        """Return whether the owner's process has ended; None if that cannot be seen from here."""
        if self.outcome:
            return True
        if self.kernel != _kernel() or not self.kernel:
            return None
        return _start_ticks(self.process) != self.started

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}"


def _kernel() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _start_ticks(process: int) -> str:
    """Return when a process started; "" once it has ended, collected or not."""
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    fields = text.rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else fields[19]


@dataclass(frozen=True)
class PreviousOwner:
    """What the last owner left behind, for the record of a restart."""

    iteration: int
    seconds: float
    """Seconds since it last wrote its claim, by the clock of the file system."""
    failed: bool


class Claim:
    """The right to write into one folder, held by this process.

    Args:
        folder: exists.
        say: is told of an owner that is being watched, once.
        patience: seconds in which an owner that is alive may end: of a run that is started again,
            ranks that are cut off from it wait for their own timeout.

    Raises:
        UsageError: another process writes there.
        OSError: the claim cannot be written.
    """

    def __init__(self, folder: Path, say: Callable[[str], None], *, patience: float = 0.0) -> None:
        self.folder, self.say = folder, say
        self.gives_up = time.monotonic() + patience
        self.owner = Owner.here()
        self.before: PreviousOwner | None = None
        self.iteration = 0
        """The last iteration that was trained; the heartbeat writes it down."""
        self.is_lost = False
        """Whether the heartbeat has found another owner."""
        self.number = self._take()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._beat, daemon=True)
        self.thread.start()

    @property
    def path(self) -> Path:
        """The claim's file."""
        return _path(self.folder, self.number)

    def _take(self) -> int:
        has_said = False
        while True:
            number = max(_numbers(self.folder), default=0)
            path = _path(self.folder, number)
            owner = _read(path)
            if path.exists() and not (owner and owner.is_gone()):
                if owner and not has_said and owner.is_gone() is None:
                    self.say(f"{self.folder} was last written by {owner}: is it still at work?")
                    has_said = True
                self._watch(number, owner)
            if self._link(number + 1):
                self.before = self._look_back(number, owner) if owner else None
                for old in _numbers(self.folder):
                    if old <= number:
                        _path(self.folder, old).unlink(missing_ok=True)
                return number + 1

    def _watch(self, number: int, owner: Owner | None) -> None:
        """Return when the owner has been silent for a lifetime, or is known to have ended.

        A claim that cannot be read for a moment, as on a file system between machines, does not
        mean that its owner is dead.

        Raises:
            UsageError: the owner is alive.
        """
        deadline = time.monotonic() + LIFETIME
        while time.monotonic() < deadline:
            time.sleep(min(0.2, LIFETIME / 10))
            now = _read(_path(self.folder, number))
            if not _path(self.folder, number).exists() or (now and now.is_gone()):
                return
            if now and owner and now.beat != owner.beat:
                if time.monotonic() > self.gives_up:
                    raise UsageError(
                        f"--save {self.folder} is being written by {now}: end that run first, or "
                        "give another --save."
                    )
                owner, deadline = now, time.monotonic() + LIFETIME
            owner = owner or now

    def _link(self, number: int) -> bool:
        mine = self.folder / f".writer.{self.owner.token}"
        write_durably(mine, _text(self.owner))
        try:
            _path(self.folder, number).hardlink_to(mine)
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            return self._create(number)
        finally:
            mine.unlink(missing_ok=True)
        return True

    def _create(self, number: int) -> bool:
        try:
            with _path(self.folder, number).open("x", encoding="utf-8") as file:
                file.write(_text(self.owner))
        except FileExistsError:
            return False
        return True

    def _look_back(self, number: int, owner: Owner) -> PreviousOwner:
        """Compare two files' times, both of the file system's clock."""
        try:
            now = _path(self.folder, number + 1).stat().st_mtime
            then = _path(self.folder, number).stat().st_mtime
        except OSError:
            now = then = 0.0
        return PreviousOwner(owner.iteration, max(0.0, now - then), owner.outcome != DONE)

    def _beat(self) -> None:
        while not self.done.wait(INTERVAL):
            with contextlib.suppress(OSError):  # a full disk: the next one may get through
                if not self._is_mine():
                    self.is_lost = True
                    return
                self._write()

    def _write(self, *, outcome: str = "") -> None:
        beat, iteration = self.owner.beat + 1, self.iteration
        self.owner = replace(self.owner, beat=beat, iteration=iteration, outcome=outcome)
        write_durably(_path(self.folder, self.number), _text(self.owner))

    def _is_mine(self) -> bool:
        if max(_numbers(self.folder), default=0) != self.number:
            return False
        owner = _read(_path(self.folder, self.number))
        return owner is None or owner.token == self.owner.token

    def check(self) -> None:
        """Make sure that this process may still write.

        Raises:
            TakenOverError: another one has taken the folder over.
        """
        self.is_lost = self.is_lost or not self._is_mine()
        if self.is_lost:
            number = max(_numbers(self.folder), default=0)
            by = _read(_path(self.folder, number)) or "another process"
            raise TakenOverError(
                f"--save {self.folder} was taken over by attempt {number} ({by}) while this one, "
                f"{self.number}, did not answer: nothing is saved by it any more. End this run."
            )

    def release(self, outcome: str) -> None:
        """Let the next owner have the folder at once, and know how this one has ended."""
        self.done.set()
        self.thread.join()
        with contextlib.suppress(OSError):
            if not self.is_lost and self._is_mine():
                self._write(outcome=outcome)


def _numbers(folder: Path) -> list[int]:
    return [int(match[1]) for path in folder.iterdir() if (match := NAME.fullmatch(path.name))]


def _path(folder: Path, number: int) -> Path:
    return folder / f".writer-{number:06d}"


def _text(owner: Owner) -> str:
    return json.dumps(asdict(owner)) + "\n"


def _read(path: Path) -> Owner | None:
    """Return the owner in a claim; None if it is missing or was not written by a process of this
    kind."""
    try:
        return Owner(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
