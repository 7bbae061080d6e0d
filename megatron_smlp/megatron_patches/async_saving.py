"""`--async-save` on a CPU: a process is forked for one save.

Megatron hands the tensors to a worker process that lives on. On a CPU that shares the memory of
the weights: the worker would write what the next steps make of them. A forked process sees the
moment of the fork, without a copy of what does not change.

Where there is a GPU the worker stays. Megatron prefers the writer of nvidia-resiliency-ext where
that is installed, which our own steps around a save (checksums, one rename at the end) do not
reach: the writer is Megatron's own everywhere.
"""

from __future__ import annotations

import os
import pickle
import queue
import tempfile
from collections.abc import Callable
from typing import IO, Any


def results_queue(original: Callable[..., Any]) -> Callable[..., Any]:
    """For `get_write_results_queue`: how a writer tells what it wrote where.

    Megatron starts a process for it, which outlives a run that is killed. A persistent worker does
    need that one; a writer in this process, or in a fork of it, does not.
    """

    def get(mp_mode: str = "spawn") -> Any:
        from megatron.training import get_args

        args = get_args()
        if args.async_save and args.use_persistent_ckpt_worker:
            return original(mp_mode)
        return ForkedQueue()

    return get


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
