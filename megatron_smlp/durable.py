"""Writes that survive a crash: on the disk before they have their name, and never half."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def write_durably(path: Path, content: str | bytes) -> None:
    """Write a file that is whole or not there: under another name, to the disk, then renamed.

    Raises:
        OSError: nothing of it is left, and what had the name before is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    sync_folder(path.parent)


@contextlib.contextmanager
def naming_errors(path: Path) -> Iterator[None]:
    """Give an error of the system a file's name where it has none: a full disk's names no file."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk: a rename is not there before."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_folder(folder: Path, *, suffix: str = ".deleted") -> None:
    """Remove a folder so that a crash never leaves a part of it under its name.

    Raises:
        OSError: it could not be renamed. What cannot be deleted after that stays, renamed.
    """
    aside = folder.with_name(f".{folder.name.lstrip('.')}{suffix}")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)
