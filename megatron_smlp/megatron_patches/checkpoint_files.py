"""Patches how Megatron writes a checkpoint's files: errors keep their text and reach all ranks.

With `--async-save`, Megatron's own writer forks one process per save (decision 21), which sees
memory as of the fork without copying what does not change; tensors on a GPU are copied to the host
first.

table.py lists the functions and why each is replaced.
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
    """Replace the functions for the duration of one run, then restore the originals.

    Args:
        note: called with an error on this rank that would leave the others waiting in Megatron.
    """
    return wrapped_in(
        (FileSystemWriterAsync, "write_preloaded_data", _naming_the_file),
        (FileSystemWriterAsync, "finish", _noting(note)),
        (serialization, "save_config", _noting(note)),
        # A writer in this process or a fork of it needs no extra process to hold its results.
        (filesystem_async, "get_write_results_queue", lambda _: ForkedQueue),
    )


class ForkedQueue:
    """Passes one object of any size from a forked process to its parent, in anonymous memory."""

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
        """Return what was put, or an exception object if nothing was."""
        self.file.seek(0)
        try:
            return pickle.load(self.file)
        except (EOFError, pickle.UnpicklingError):
            return RuntimeError("the process that wrote it was ended (out of memory?)")


def _naming_the_file(write: Callable[..., Any]) -> Any:
    @functools.wraps(write)
    def wrapped(transforms: Any, **kwargs: Any) -> Any:
        output = write([_Transforms()], **kwargs)
        is_last = kwargs["results_queue"] is None  # the others report errors through their queue
        if is_last and isinstance(output[1], Exception):
            reason = getattr(output[1], "strerror", None) or output[1]
            _let_go(output[1])
            raise RuntimeError(f"{Path(kwargs['write_bucket'][0]).name}: {reason}") from output[1]
        return output

    return staticmethod(wrapped)


def _let_go(error: BaseException | None) -> None:
    """Free what was being written right away: the cyclic garbage collector would free the writer
    after its file, and Python would report that."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


class _Transforms(_StorageWriterTransforms):
    def transform_save_stream(self, write_item: Any, raw_stream: Any) -> tuple[Any, list[str]]:
        return _Stream(raw_stream), []


class _Stream(io.RawIOBase):
    """A file for one item; tolerates torch's extra write when it releases a broken archive."""

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
