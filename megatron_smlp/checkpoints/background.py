"""--async-save: files are written by a process that is forked for one save. Decision 21."""

from __future__ import annotations

import contextlib
import functools
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_smlp.checkpoints import integrity


def add_share(partial: Path, rank: int) -> None:
    """Leave the checksums of this rank's shards; where that fails, `commit` computes them."""
    with contextlib.suppress(OSError):
        integrity.write_share(partial, rank=rank)


def in_background(
    request: Any,
    partial: Path,
    rank: int,
    *,
    first: Callable[[], None],
    commit: Callable[[], None],
) -> Any:
    """Return Megatron's request with our steps: the writer calls `first`, and leaves its checksums;
    when all ranks' are done, this process commits."""
    request.finalize_fns.append(commit)
    if request.async_fn is None:  # nothing to write on this rank
        return request
    write = functools.partial(write_and_add_share, request.async_fn, partial, rank, first)
    return request._replace(async_fn=write)


def write_and_add_share(
    write: Callable[..., Any],
    partial: Path,
    rank: int,
    first: Callable[[], None],
    *args: Any,
    **kwargs: Any,
) -> None:
    """Write shards, then leave their checksums: the work of a process that writes."""
    first()
    # Ctrl-C reaches every process at the terminal; the training process answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        write(*args, **kwargs)
    except Exception as error:
        args[-1].put(RuntimeError(repr(error)))  # its queue: nobody else tells the training process
        return
    add_share(partial, rank)
