"""A folder that is there whole or not at all.

It is written beside its place under the name `.NAME.partial-PID`, brought to the disk, and renamed.
Ctrl-C, a full disk and any other error remove what was written.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

from megatron_smlp.durable import sync_folder
from megatron_smlp.errors import UsageError
from megatron_smlp.interrupts import interrupt


@contextlib.contextmanager
def whole_folder(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A new folder to write into; at the end it takes the place of `target`.

    Raises:
        UsageError: `target` holds something and `overwrite` is false, or cannot be written.
    """
    check_target(target, overwrite=overwrite)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        with _terminated_like_interrupted():
            target.parent.mkdir(parents=True, exist_ok=True)
            partial.mkdir()
            yield partial
            flush_folder(partial)
            _replace(partial, target)
    except OSError as error:
        name = error.filename or target
        raise UsageError(f"{name} cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_target(target: Path, *, overwrite: bool) -> None:
    """Raise UsageError where writing `target` would lose something."""
    if target.exists() and not target.is_dir():
        raise UsageError(f"--save {target} is a file: give a folder.")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise UsageError(
            f"--save {target} is not empty: give another folder, or --overwrite to replace it."
        )


def check_apart(target: Path, source: Path) -> None:
    """Raise UsageError where writing `target` would delete what is read."""
    if target.resolve() in (source.resolve(), *source.resolve().parents):
        raise UsageError(
            f"--save {target} holds --load {source}, which would be deleted: give another folder."
        )


def flush_folder(folder: Path) -> None:
    """Bring every file and folder below `folder`, and itself, to the disk."""
    for path in [*folder.rglob("*"), folder]:
        sync_folder(path)  # which does the same for a file


def _replace(partial: Path, target: Path) -> None:
    if target.is_dir() and any(target.iterdir()):
        old = target.with_name(f".{target.name}.replaced-{os.getpid()}")
        target.rename(old)
        partial.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        partial.replace(target)
    sync_folder(target.parent)


@contextlib.contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM leaves nothing half either."""

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
