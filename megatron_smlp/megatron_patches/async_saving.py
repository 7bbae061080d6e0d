"""`--async-save`: a process is forked for one save, by Megatron's own writer. Decision 21.

A forked process sees the moment of the fork, without a copy of what does not change; from a GPU the
tensors are copied to the host before.
"""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Callable
from typing import IO, Any


def results_queue(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replace `get_write_results_queue`, by which a writer reports the places of what it wrote.

    Megatron starts a process for it, which outlives a run that is killed. A writer in this process,
    or in a fork of it, does not need that one.
    """
    return lambda mp_mode="spawn": ForkedQueue()


class ForkedQueue:
    """One object from a forked process to its parent, of any size, in memory without a name."""

    def __init__(self) -> None:
        self.file: IO[bytes] = (
            os.fdopen(os.memfd_create("results"), "w+b")
            if hasattr(os, "memfd_create")
            else tempfile.TemporaryFile()  # noqa: SIM115
        )

    def put(self, item: Any) -> None:
        self.file.write(pickle.dumps(item))
        self.file.flush()

    def get_nowait(self) -> Any:
        """Return what was put, or an error where nothing was."""
        self.file.seek(0)
        try:
            return pickle.load(self.file)
        except (EOFError, pickle.UnpicklingError):
            return RuntimeError("the process that wrote it was ended (out of memory?)")
