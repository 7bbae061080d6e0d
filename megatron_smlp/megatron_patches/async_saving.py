"""`--async-save`: a process is forked for one save.

Megatron would hand the tensors to a worker process that lives on. On a CPU that shares the memory
of the weights: it would write what the next steps make of them. On a GPU the signal that tells a
run to save and end, which reaches all processes of a rank, ends the worker, and the rank waits for
it for ever; so it does where an error ends the run. A forked process sees the moment of the fork,
without a copy of what does not change; from a GPU the tensors are copied to the host before.

Megatron prefers the writer of nvidia-resiliency-ext where that is installed, which our own steps
around a save (checksums, one rename at the end) do not reach: the writer is Megatron's own
everywhere.
"""

from __future__ import annotations

import os
import pickle
import queue
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
        pickle.dump(item, self.file)
        self.file.flush()

    def get_nowait(self) -> Any:
        """Return what was put.

        Raises:
            queue.Empty: nothing was.
        """
        self.file.seek(0)
        try:
            return pickle.load(self.file)
        except EOFError:
            raise queue.Empty from None
