"""Hook our steps around saving and loading into Megatron's functions, on every device.

The functions, and why each is replaced: table.py.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import itertools
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.training import checkpointing, training
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageWriterTransforms

from megatron_smlp.checkpoints.folders import TRACKER, tracked_iteration
from megatron_smlp.checkpoints.saving import Saving, add_share, write_and_add_share
from megatron_smlp.durable import write_durably
from megatron_smlp.errors import SaveError
from megatron_smlp.megatron_patches import async_saving
from megatron_smlp.megatron_patches.wrapping import after, wrapped_in

FAILURES = (CheckpointException, SaveError)


def installed(
    saving: Saving, *, before_loading: Callable[[], None], before_writing: Callable[[], None]
) -> contextlib.AbstractContextManager[None]:
    """Replace the functions for the time of one `pretrain`, and put the originals back.

    Args:
        before_writing: is called in each process that is forked to write.
    """
    return wrapped_in(
        (dist_checkpointing, "save", lambda f: _saving_whole(f, saving, before_writing)),
        (checkpointing, "ensure_directory_exists", _leaving_checkpoints_out),
        (checkpointing, "maybe_msc", _WritingAtomically),
        (checkpointing, "read_metadata", _tolerating_garbage),
        (FileSystemWriterAsync, "write_preloaded_data", _naming_the_file),
        (FileSystemWriterAsync, "finish", _noting(saving)),
        (serialization, "save_config", _noting(saving)),
        (filesystem_async, "get_write_results_queue", async_saving.results_queue),
        (training, "save_checkpoint", lambda f: _surviving_start(f, saving)),
        (training, "maybe_finalize_async_save", lambda f: _surviving_end(f, saving)),
        (training, "setup_model_and_optimizer", lambda f: after(before_loading, f)),
    )


def _saving_whole(
    save: Callable[..., Any], saving: Saving, before_writing: Callable[[], None]
) -> Callable[..., Any]:
    @functools.wraps(save)
    def wrapped(
        state: Any, checkpoint_dir: str, *args: Any, async_sharded_save: bool = False, **kwargs: Any
    ) -> Any:
        folder, rank = saving.start(Path(checkpoint_dir)), saving.args.rank
        request = save(state, str(folder), *args, async_sharded_save=async_sharded_save, **kwargs)
        if not async_sharded_save:
            add_share(folder, rank)
            saving.commit()
            return None
        request.finalize_fns.append(saving.commit)
        if request.async_fn is None:  # nothing to write on this rank
            return request
        write = functools.partial(write_and_add_share, request.async_fn, folder, rank)
        return request._replace(async_fn=after(before_writing, write))

    return wrapped


def _leaving_checkpoints_out(ensure: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(ensure)
    def wrapped(filename: str, check_parent: bool = True) -> None:
        if check_parent:
            ensure(filename)

    return wrapped


class _WritingAtomically:
    """Megatron's storage client, of which one method is another."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def __getattr__(self, name: str) -> Any:
        return getattr(self.client, name)

    def open(self, path: str, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        is_tracker = Path(path).name == TRACKER and mode == "w"
        return _Tracker(Path(path)) if is_tracker else self.client.open(path, mode, *args, **kwargs)


class _Tracker(io.StringIO):
    """Becomes the tracker when it is closed, unless a commit has written the same before."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def close(self) -> None:
        text = "" if self.closed else self.getvalue()
        super().close()
        if text and not (self.path.exists() and self.path.read_text(encoding="utf-8") == text):
            write_durably(self.path, text)


def _tolerating_garbage(read: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(read)
    def wrapped(tracker_filename: str) -> tuple[int, bool]:
        path = Path(tracker_filename)
        text = path.read_bytes().strip()
        is_readable = text == b"release" or tracked_iteration(path.parent) is not None
        return read(tracker_filename) if is_readable else (-1, False)

    return wrapped


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
def _noting(saving: Saving) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        saving.note(error)


def _surviving_start(save: Callable[..., None], saving: Saving) -> Callable[..., None]:
    @functools.wraps(save)
    def wrapped(iteration: int, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        if _gathers_on_gpus(saving.args) and not saving.has_room(iteration, _no_room(optimizer)):
            return
        try:
            save(iteration, model, optimizer, *args, **kwargs)
        except FAILURES as error:
            saving.failed(saving.open[-1], error)

    return wrapped


def _gathers_on_gpus(args: argparse.Namespace) -> bool:
    """Return whether a save puts the optimizer's state together there, before it writes."""
    return (
        args.ckpt_format == "torch_dist"
        and args.use_distributed_optimizer
        and args.dist_ckpt_optim_fully_reshardable
        and not args.distrib_optim_fully_reshardable_mem_efficient
        and not args.no_save_optim
    )


def _no_room(optimizer: Any) -> str:
    """Return what is missing for that, or an empty text.

    The memory is taken as `DistributedOptimizer.get_parameter_state_dp_zero` takes it, and is
    cached for it: there, in the middle of a collective, the other ranks would wait for ever.
    """
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        for bucket in itertools.chain(*(b.buckets for b in getattr(one, "buffers", ()))):
            ranks = one.data_parallel_group.size()
            part = bucket.grad_data.numel() // ranks
            try:
                _take(ranks + 1, part)  # one of each rank, and this one's copy
            except torch.OutOfMemoryError:
                gigabytes = (ranks + 1) * part * torch.float32.itemsize / 2**30
                return f"a GPU has no room for {gigabytes:.1f} GiB of the optimizer's state"
    return ""


def _take(count: int, size: int) -> None:
    device = torch.cuda.current_device()
    _ = [torch.empty(size, dtype=torch.float32, device=device) for _ in range(count)]


def _surviving_end(finalize: Callable[..., None], saving: Saving) -> Callable[..., None]:
    @functools.wraps(finalize)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        while True:
            try:
                finalize(*args, **kwargs)
                return
            except FAILURES as error:
                saving.failed(saving.open[0], error)  # and on with the next in the queue

    return wrapped
