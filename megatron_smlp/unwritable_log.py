"""A log that cannot be written, as on a full disk: its lines are lost, and the run lives on."""

from __future__ import annotations

import atexit
import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

FULL = (errno.ENOSPC, errno.EDQUOT)


def to_stderr(line: str) -> None:
    """Print it there; nothing, as an exit code, depends on whether anybody reads it."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


class UnwritableLog:
    """Says once, on standard error, that lines of `path` are lost."""

    def __init__(self, path: Path | str) -> None:
        self.path = path
        self.is_said = False

    @contextlib.contextmanager
    def tolerated(self) -> Iterator[None]:
        """Let no OSError out."""
        try:
            yield
        except OSError as error:
            if not self.is_said:
                self.is_said = True
                remedy = " Make room there." if error.errno in FULL else ""
                with contextlib.suppress(OSError):  # as where both are one pipe
                    print(
                        f"WARNING: {self.path} cannot be written ({error.strerror}): its lines are "
                        f"LOST as long as that is so; the run goes on.{remedy}",
                        file=sys.__stderr__,
                        flush=True,
                    )


class TolerantStream(io.TextIOBase):
    """A stream, as of a pipe whose reader may go, that a run does not depend on.

    Args:
        name: what it is called where its lines are lost.
    """

    def __init__(self, stream: TextIO, name: str) -> None:
        self.stream, self.lost = stream, UnwritableLog(name)
        atexit.register(drop_unwritten, stream)

    def write(self, text: str) -> int:
        with self.lost.tolerated():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self.lost.tolerated():
            self.stream.flush()

    def isatty(self) -> bool:
        return self.stream.isatty()

    def fileno(self) -> int:
        return self.stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.stream.encoding


def drop_unwritten(stream: TextIO) -> None:
    """Let what could not be written go: it is still in a buffer, and would fail once more."""
    try:
        stream.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
