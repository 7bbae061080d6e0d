"""Replacing a file or a folder so that a crash never leaves half of one under its name."""

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
"""Name of the file by which a folder is locked."""
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
_deleting = ThreadPoolExecutor(1)


def write_durably(
    path: Path, content: str | bytes, *, before_rename: Callable[[], None] = lambda: None
) -> None:
    """Write a file that is whole or not there: under another name, to the disk, then renamed.

    Args:
        before_rename: may raise, which leaves nothing of it either.

    Raises:
        OSError: nothing of it is left, and what had the name before is untouched.
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
    """Return a name that no other writer has: process numbers are the same on several hosts."""
    return path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")


def link_durably(source: Path, target: Path) -> None:
    """Give a finished file a second name, at once, in place of an older file of that name.

    It keeps its first name, so that this can be repeated after a crash in the middle of several;
    where the file system knows no links it is moved.
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
    """Give a finished folder its name, in place of an older folder of that name.

    At every moment one of both is there, whole. What a crash interrupts leaves the older one as
    `.NAME.replaced`.

    Raises:
        OSError: the older one is still there.
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
    """Bring every file and folder below `folder`, and itself, to the disk."""
    for path in [*folder.rglob("*"), folder]:
        sync_folder(path)  # which does the same for a file


@contextlib.contextmanager
def naming_errors(path: Path) -> Iterator[None]:
    """Give an error of the system a file's name where it has none: a full disk's names no file,
    and that of a library in Rust is a text with `(os error 28)`."""
    try:
        yield
    except Exception as error:
        in_text = re.search(r"os error (\d+)", str(error))
        number = int(in_text[1]) if in_text else getattr(error, "errno", None)
        if number is None or getattr(error, "filename", None) is not None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def text_of(error: OSError) -> str:
    """Return `/run/.iter_0000010.partial-4f1c/__0_0.distcp: No space left on device`."""
    return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)


def lock_if_possible(file: IO[bytes], operation: int) -> None:
    """Lock a file as `fcntl.flock` does; where a file system has no locks, as Lustre without
    `-o flock`, nobody is kept out.

    Raises:
        BlockingIOError: another process holds it, and LOCK_NB is asked for.
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
    """Bring the names in a folder to the disk: a rename is not there before."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_folder(folder: Path) -> None:
    """Remove a folder so that a crash never leaves a part of it under its name.

    It is renamed at once and deleted in the background: a large one may take minutes, and ranks may
    wait for the caller. The interpreter does not end before that is done.

    Raises:
        OSError: it could not be renamed. What cannot be deleted after that stays, renamed.
    """
    aside = folder.with_name(f".{folder.name.lstrip('.')}.deleted")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    delete_in_background(aside)


def delete_in_background(folder: Path) -> Future[None]:
    """Delete what nobody looks for any more; what cannot be deleted stays."""
    return _deleting.submit(shutil.rmtree, folder, ignore_errors=True)


def lock_folder(folder: Path) -> IO[bytes]:
    """Make a folder, and lock it by a file in it until that is closed.

    Raises:
        BlockingIOError: another process holds it.
    """
    path = folder / LOCK
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # as its owner removed it just now
            file = path.open("wb")
            try:
                lock_if_possible(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                    return file
                file.close()
            except BaseException:
                file.close()
                raise


def empty_locked(folder: Path) -> None:
    """Remove all that lies in a locked folder, but for the lock."""
    for path in folder.iterdir():
        if path.name != LOCK:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def remove_locked(folder: Path, lock: IO[bytes]) -> None:
    """Remove a locked folder, and close its lock. The lock goes last: whoever takes the folder
    then makes another one, which is left alone.

    What NFS keeps for a while, since an error has left it open, stays behind.
    """
    with contextlib.suppress(OSError):
        empty_locked(folder)
    with contextlib.suppress(OSError):
        (folder / LOCK).unlink()
    lock.close()
    with contextlib.suppress(OSError):
        folder.rmdir()
