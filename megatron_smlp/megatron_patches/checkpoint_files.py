"""Megatron's writing of a checkpoint's files: errors keep their text, and reach all ranks.

With `--async-save` a process is forked for one save, by Megatron's own writer (decision 21): it
sees the moment of the fork, without a copy of what does not change; from a GPU the tensors are
copied to the host before.

The functions, and why each is replaced: table.py.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from torch.distributed.checkpoint.filesystem import _StorageWriterTransforms

from megatron_smlp.megatron_patches.wrapping import wrapped_in


def installed(note: Callable[[OSError], None]) -> contextlib.AbstractContextManager[None]:
    """Replace the functions for the time of one run, and put the originals back.

    Args:
        note: is told of an error of this rank at which Megatron would leave the others waiting.
    """
    return wrapped_in(
        (FileSystemWriterAsync, "write_preloaded_data", _naming_the_file),
        (FileSystemWriterAsync, "finish", _noting(note)),
        (serialization, "save_config", _noting(note)),
        # A writer in this process, or in a fork of it, needs no process to hold its results.
        (filesystem_async, "get_write_results_queue", lambda _: ForkedQueue),
    )


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


def _naming_the_file(write: Callable[..., Any]) -> Any:
    @functools.wraps(write)
    def wrapped(transforms: Any, **kwargs: Any) -> Any:
        output = write([_Transforms()], **kwargs)
        is_last = kwargs["results_queue"] is None  # the others' errors go through a queue of theirs
        if is_last and isinstance(output[1], Exception):
            reason = getattr(output[1], "strerror", None) or output[1]
            _let_go(output[1])
            raise RuntimeError(f"{Path(kwargs['write_bucket'][0]).name}: {reason}") from output[1]
        return output

    return staticmethod(wrapped)


def _let_go(error: BaseException | None) -> None:
    """Free what was being written now: the collector of circles would free the writer after its
    file, and Python would report that."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


class _Transforms(_StorageWriterTransforms):
    def transform_save_stream(self, write_item: Any, raw_stream: Any) -> tuple[Any, list[str]]:
        return _Stream(raw_stream), []


class _Stream(io.RawIOBase):
    """A file for one item; torch writes to it once more when it lets go of a broken archive."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def write(self, data: Any) -> int:
        return len(data) if self.file.closed else self.file.write(data)

    def flush(self) -> None:
        if not self.file.closed:
            self.file.flush()


@contextlib.contextmanager
def _noting(note: Callable[[OSError], None]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        note(error)
