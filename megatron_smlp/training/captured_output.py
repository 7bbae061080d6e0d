"""Keeps what Megatron and torch print off the terminal, and in a log file instead.

From the first import on, standard output, warnings and library logging are buffered in memory; once
the log folder is known, they go to `megatron.log` there. training/reporting.py writes to the
terminal what is meant for the user; errors go to standard error as always.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from pathlib import Path
from typing import Any, Self, TextIO

from megatron_smlp.errors import UsageError
from megatron_smlp.unwritable_log import TolerantStream, UnwritableLog


class FolderError(UsageError):
    """A folder that a run writes to cannot be used; any rank may be the only one that notices."""

    speaker = ""


class CapturedOutput(TolerantStream):
    """`with CapturedOutput() as output: ...; output.open(folder, rank=0)`."""

    def __init__(self) -> None:
        super().__init__(io.StringIO(), "megatron.log")
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self.stack.enter_context(contextlib.redirect_stdout(self))
        self.stack.enter_context(warnings.catch_warnings())
        warnings.showwarning = self._show_warning
        logging.basicConfig(stream=self, level=logging.INFO)
        # It has its own handler, and reports missing CUDA on every machine without it.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()
        self.flush()

    def open(self, folder: str | None, *, rank: int) -> None:
        """Continue in `folder`/megatron.log (on rank 3, megatron.rank3.log); None: discard all.

        Raises:
            FolderError: the folder cannot be created or written to.
        """
        if folder is None:
            self.stream = Path("/dev/null").open("w", encoding="utf-8")  # noqa: SIM115
            return
        path = Path(folder) / ("megatron.log" if rank == 0 else f"megatron.rank{rank}.log")
        self.lost = UnwritableLog(path)
        earlier = self.stream.getvalue() if isinstance(self.stream, io.StringIO) else ""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.stream = path.open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise FolderError(
                f"--log-dir {folder} (defaults to --save) cannot be written to: {error.strerror}: "
                "give another folder."
            ) from error
        self.write(earlier)

    def _show_warning(self, *what: Any, **_: Any) -> None:
        self.write(warnings.formatwarning(*what[:4]))


def terminal() -> TextIO:
    """Return the real standard output, even while it is redirected."""
    return sys.__stdout__ or sys.stderr
