"""Megatron's writing of a checkpoint's files: errors keep their text, and reach all ranks.

The functions, and why each is replaced: table.py.
"""

from __future__ import annotations

import contextlib
import functools
import io
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from torch.distributed.checkpoint.filesystem import _StorageWriterTransforms

from megatron_smlp.megatron_patches import async_saving
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
        (filesystem_async, "get_write_results_queue", async_saving.results_queue),
    )


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
