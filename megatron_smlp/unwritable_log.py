"""Tolerates a log that cannot be written, as on a full disk: lines are lost, the run continues."""

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
    """Print a line to stderr; a missing reader must not affect anything, such as the exit code."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


class UnwritableLog:
    """Warns once, on standard error, that lines of `path` are lost."""

    def __init__(self, path: Path | str) -> None:
        self.path = path
        self.is_said = False

    @contextlib.contextmanager
    def tolerated(self) -> Iterator[None]:
        """Suppress OSError in the block, with one warning."""
        try:
            yield
        except OSError as error:
            if not self.is_said:
                self.is_said = True
                remedy = " Free space there." if error.errno in FULL else ""
                with contextlib.suppress(OSError):  # e.g. both are the same pipe
                    print(
                        f"WARNING: {self.path} cannot be written ({error.strerror}): its lines are "
                        f"LOST until that is fixed; the run continues.{remedy}",
                        file=sys.__stderr__,
                        flush=True,
                    )


class TolerantStream(io.TextIOBase):
    """A stream whose failure a run survives, such as a pipe whose reader may go away.

    Args:
        name: its name in the warning that lines are lost.
    """

    def __init__(self, stream: TextIO, name: str) -> None:
        self.stream, self.lost = stream, UnwritableLog(name)
        atexit.register(self._drop_unwritten)

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

    def _drop_unwritten(self) -> None:
        """Discard what is still in a buffer: flushing it at exit would fail again."""
        try:
            self.stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)
