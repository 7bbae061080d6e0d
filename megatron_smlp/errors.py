"""Errors for the user: one line that names the thing, its value, what is allowed, what to do."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn


class UserError(ValueError):
    """Its text is shown as it is, without a traceback; the process ends with `exit_code`."""

    exit_code = 1
    every_rank = True
    """Whether all ranks raise it together, so that rank 0 can speak for them."""


class UsageError(UserError):
    """A flag, a file or a combination of them is wrong."""

    exit_code = 2


class NonFiniteLossError(UserError):
    """A loss was NaN or infinite and the run was told to stop at one."""

    exit_code = 3


class CheckpointError(UserError):
    """A checkpoint cannot be loaded or saved. Any rank may be the only one that sees it."""

    every_rank = False


class DamagedCheckpointError(CheckpointError):
    """A file of a checkpoint is missing, or is not what was written."""


class SaveError(UserError):
    """A checkpoint could not be saved; all ranks have agreed on that."""


class NoGoodCheckpointError(UserError):
    """None of the checkpoints that may be loaded is whole; all ranks have agreed on that."""


class UnsafeCheckpointError(CheckpointError):
    """A checkpoint would run code while it is loaded."""


_interrupted = threading.Event()


def interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """A signal handler: Python's own for SIGINT, which notes for `is_interruption` that it ran."""
    _interrupted.set()
    raise KeyboardInterrupt


def is_interruption(error: BaseException | None) -> bool:
    """Whether an error only follows from an interruption.

    Native code that is interrupted in a call back to Python (torch, at work on its archives) may
    let the interruption go and complain of what it left behind, such as a closed file.
    """
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None or _interrupted.is_set()


@contextlib.contextmanager
def _noting_interruptions() -> Iterator[None]:
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _interrupted.clear()


def is_first_rank() -> bool:
    """Whether this process may speak for all, before there is a process group too."""
    return int(os.environ.get("RANK", "0")) == 0


def _end_workers() -> None:
    """Data loader workers ignore SIGTERM, and exiting would wait for them for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report their deaths
    for child in multiprocessing.active_children():
        child.kill()


@contextlib.contextmanager
def readable_errors(program: str) -> Iterator[None]:
    """Turn a UserError into one line on stderr, once for all ranks, and its exit code.

    So it is with Ctrl-C where nothing else is made of it; the code is the one shells expect.
    """
    try:
        with _noting_interruptions():
            try:
                yield
            except Exception as error:
                if is_interruption(error):
                    raise KeyboardInterrupt from error
                raise
    except UserError as error:
        if not error.every_rank or is_first_rank():
            print(f"{program}: error: {error}", file=sys.stderr, flush=True)
        _end_workers()
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt as error:
        if is_first_rank():
            print(f"{program}: interrupted", file=sys.stderr, flush=True)
        _end_workers()
        _never_collect(error)
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception:
        _end_workers()
        raise


def _never_collect(error: BaseException) -> None:
    """Keep what an interruption left half done, which its frames hold, until the process is gone.

    A writer of torch's whose file is closed before its time complains when it is collected at the
    end, in the middle of an exit function, and may abort the process.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(error))


@contextlib.contextmanager
def undisturbed_exit() -> Iterator[None]:
    """For a program's outermost block: from its end on, Ctrl-C has nothing left to stop.

    Exit functions take a second, and one that is interrupted prints a traceback.
    """
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


class _FileError(UserError):
    """A file of the user's; any rank may be the only one that sees it."""

    every_rank = False


# What a disk says without a file's name, and no fault of the program.
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def run_tool(main: Callable[[], int | None]) -> NoReturn:
    """Run a tool's `main` and exit with what it returns; None is 0.

    Errors of the user's, files that cannot be read or written, and Ctrl-C end it as
    `readable_errors` says. A broken pipe (`tool | head`) is no error.
    """
    with readable_errors(Path(sys.argv[0]).name):
        try:
            code = main()
        except BrokenPipeError:
            # The interpreter flushes stdout once more at exit, which would raise again.
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123
            code = 0
        except OSError as error:
            if error.filename is None and error.errno not in _OF_THE_DISK:
                raise
            name = "" if error.filename is None else f"{error.filename}: "
            raise _FileError(f"{name}{error.strerror}") from None
    sys.exit(code or 0)
