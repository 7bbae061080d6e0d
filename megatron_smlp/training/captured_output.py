"""Keeps what Megatron and torch print out of the user's sight, but not out of reach.

From the first import on, standard output, warnings and library logging go into memory, and then, as
soon as the log folder is known, into `megatron.log` there. What is for the user is written to the
terminal by training/reporting.py; errors go to standard error as always.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from pathlib import Path
from typing import Any, TextIO

from megatron_smlp.errors import UsageError
from megatron_smlp.unwritable_log import UnwritableLog, drop_unwritten


class FolderError(UsageError):
    """A folder that a run writes to; any rank may be the only one that sees it."""

    speaker = ""


class CapturedOutput(contextlib.AbstractContextManager["CapturedOutput"]):
    """`with CapturedOutput() as output: ...; output.open(folder, rank=0)`."""

    def __init__(self) -> None:
        self.file: TextIO = io.StringIO()
        self.lost = UnwritableLog(Path("megatron.log"))
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> CapturedOutput:
        self.stack.enter_context(contextlib.redirect_stdout(self))
        self.stack.enter_context(warnings.catch_warnings())
        warnings.showwarning = self._show_warning
        logging.basicConfig(stream=self, level=logging.INFO)
        # It has a handler of its own, and says on every machine without CUDA that there is none.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()
        self.flush()
        if self.lost.is_said:
            drop_unwritten(self.file)

    def open(self, folder: str | None, *, rank: int) -> None:
        """Go on in `folder`/megatron.log, megatron.rank3.log on rank 3; no folder keeps nothing.

        Raises:
            FolderError: the folder cannot be made or written to.
        """
        if folder is None:
            self.file = Path("/dev/null").open("w", encoding="utf-8")  # noqa: SIM115
            return
        path = Path(folder) / ("megatron.log" if rank == 0 else f"megatron.rank{rank}.log")
        self.lost = UnwritableLog(path)
        earlier = self.file.getvalue() if isinstance(self.file, io.StringIO) else ""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = path.open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise FolderError(
                f"--log-dir {folder} (--save where it is left out) cannot be written to: "
                f"{error.strerror}: give another folder."
            ) from error
        self.write(earlier)

    def write(self, text: str) -> int:
        """Write to the log; on a full disk lines are lost, and the run goes on."""
        with self.lost.tolerated():
            self.file.write(text)
        return len(text)

    def flush(self) -> None:
        with self.lost.tolerated():
            self.file.flush()

    def isatty(self) -> bool:
        return False

    def _show_warning(self, *what: Any, **_: Any) -> None:
        self.write(warnings.formatwarning(*what[:4]))


def terminal() -> TextIO:
    """Return the real standard output, whatever is redirected."""
    return sys.__stdout__ or sys.stderr
