"""Replaces files and folders such that a crash never leaves a partial one under its name."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO

LOCK = "lock"
"""Name of the file used to lock a folder."""
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
_deleting = ThreadPoolExecutor(1)


def write_durably(
    path: Path, content: str | bytes, *, before_rename: Callable[[], None] = lambda: None
) -> None:
    """Write a file atomically: to a temporary name, flushed to disk, then renamed.

    Args:
        before_rename: called before the rename; if it raises, nothing is left behind either.

    Raises:
        OSError: nothing is left behind, and a previous file of this name is untouched.
    """
    temporary = _temporary(path)
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        before_rename()
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def _temporary(path: Path) -> Path:
    """Return a name that no other writer uses; process IDs are not unique across hosts."""
    return path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")


def link_durably(source: Path, target: Path) -> None:
    """Give a finished file a second name, atomically replacing an older file of that name.

    It keeps its first name, so that a series of calls interrupted by a crash can be repeated; on a
    file system without hard links it is moved.
    """
    temporary = _temporary(target)
    try:
        temporary.hardlink_to(source)
    except OSError:
        source.replace(target)
        return
    try:
        temporary.replace(target)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def replace_folder(new: Path, target: Path) -> None:
    """Give a finished folder its name, replacing an older folder of that name.

    At every moment one of the two exists, complete. After a crash in between, the older one is
    `.NAME.replaced`.

    Raises:
        OSError: the older one is still in place.
    """
    aside = target.with_name(f".{target.name}.replaced")
    if target.exists():
        shutil.rmtree(aside, ignore_errors=True)
        target.rename(aside)
    try:
        new.rename(target)
    except OSError:
        if aside.exists():
            aside.rename(target)
        raise
    sync_folder(target.parent)
    with contextlib.suppress(OSError):  # there was none
        remove_folder(aside)


def flush_folder(folder: Path) -> None:
    """Flush `folder` and every file and folder below it to disk."""
    for path in [*folder.rglob("*"), folder]:
        sync_folder(path)  # works for files too


@contextlib.contextmanager
def naming_errors(path: Path) -> Iterator[None]:
    """Add the file's name to system errors that lack one: the error of a full disk names no file,
    and a Rust library's is only text with `(os error 28)`."""
    try:
        yield
    except Exception as error:
        in_text = re.search(r"os error (\d+)", str(error))
        number = int(in_text[1]) if in_text else getattr(error, "errno", None)
        if number is None or getattr(error, "filename", None) is not None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def text_of(error: OSError) -> str:
    """Return text like `/run/.iter_0000010.partial-4f1c/__0_0.distcp: No space left on device`."""
    return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)


def lock_if_possible(file: IO[bytes], operation: int) -> None:
    """Lock a file with `fcntl.flock`; on a file system without locks, such as Lustre without
    `-o flock`, warn and keep nobody out.

    Raises:
        BlockingIOError: another process holds the lock, and LOCK_NB is set.
    """
    try:
        fcntl.flock(file, operation)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        print(
            f"WARNING: {file.name} cannot be locked ({error.strerror}): start one at a time",
            file=sys.stderr,
        )


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk: until then a rename is not durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_folder(folder: Path) -> None:
    """Remove a folder such that a crash never leaves a part of it under its name.

    It is renamed at once and deleted in the background: a large one may take minutes, while ranks
    may wait for the caller. The interpreter does not exit before the deletion is done.

    Raises:
        OSError: it could not be renamed. What then cannot be deleted stays under the new name.
    """
    aside = folder.with_name(f".{folder.name.lstrip('.')}.deleted")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    delete_in_background(aside)


def delete_in_background(folder: Path) -> Future[None]:
    """Delete a folder that is no longer used; what cannot be deleted stays."""
    return _deleting.submit(shutil.rmtree, folder, ignore_errors=True)


def lock_folder(folder: Path) -> IO[bytes]:
    """Create a folder and lock it by a file in it, until that file is closed.

    Raises:
        BlockingIOError: another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / LOCK).open("wb")
    try:
        lock_if_possible(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise
    return file


def remove_locked(folder: Path, lock: IO[bytes]) -> None:
    """Remove a locked folder and close its lock; what NFS keeps for a while stays behind."""
    shutil.rmtree(folder, ignore_errors=True)
    lock.close()
