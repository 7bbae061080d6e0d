"""Writes that survive a crash: on the disk before they have their name, and never half."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def write_durably(path: Path, text: str) -> None:
    """Write a file that is whole or not there: under another name, to the disk, then renamed.

    Raises:
        OSError: nothing of it is left, and what had the name before is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


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
