"""End a program well: errors as one line, exit codes, no worker left behind."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import errno
import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from megatron_smlp.errors import FileError, UserError
from megatron_smlp.signals import is_interruption, noting_interruptions
from megatron_smlp.unwritable_log import to_stderr


def _is_zero(variable: str) -> bool:
    """Return whether torchrun has set it to 0, or not at all: before there is a process group."""
    return int(os.environ.get(variable, "0")) == 0


def _end_workers() -> None:
    """End data loader workers: they ignore SIGTERM, and exiting would wait for them for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report their deaths
    for child in multiprocessing.active_children():
        child.kill()


@contextlib.contextmanager
def readable_errors(program: str) -> Iterator[None]:
    """Turn a UserError into one line on stderr, of its `speaker`, and its exit code.

    So it is with Ctrl-C where nothing else is made of it; the code is the one shells expect.
    """
    try:
        with noting_interruptions():
            try:
                yield
            except Exception as error:
                if is_interruption(error):
                    raise KeyboardInterrupt from error
                raise
    except UserError as error:
        if _is_zero(error.speaker):
            machine = "" if _is_zero("RANK") else f" on {socket.gethostname()}"
            to_stderr(f"{program}{machine}: error: {error}")
        _end_workers()
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt as error:
        if _is_zero("RANK"):
            to_stderr(f"{program}: interrupted")
        _end_workers()
        _never_collect(error)
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception:
        _end_workers()
        raise


def _never_collect(error: BaseException) -> None:
    """Keep what an interruption left half done, which its frames hold, until the process is gone.

    A writer of torch's whose file is closed before its time complains when it is collected at the
    end, in the middle of an exit function, and may abort the process. A reference that nobody gives
    back keeps it, and no more than it: gc.freeze() would keep all, of which nanobind complains.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(error))


@contextlib.contextmanager
def whole_program() -> Iterator[None]:
    """Wrap a program's outermost block: behind it, call the exit functions and end the process.

    The interpreter would go on to take itself apart, with threads of native code still there. In
    two of some hundred runs on a busy machine (torch 2.15, Python 3.13) that aborted the process,
    and a run that had ended well had failed.

    Ctrl-C, which would interrupt an exit function, has nothing left to stop.
    """
    try:
        yield
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            to_stderr(str(end.code))
        _leave(end.code if isinstance(end.code, int) else int(end.code is not None))
    except BaseException:
        sys.excepthook(*sys.exc_info())
        _leave(1)
    else:
        _leave(0)


def _leave(code: int) -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading._shutdown()  # type: ignore[attr-defined]  # executors end what they have begun
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it, or it is closed
            stream.flush()
    os._exit(code)


# What the system says without a file's name, and no fault of the program.
NAMELESS_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO),
    *(errno.EMFILE, errno.ENFILE),
)


def run_tool(main: Callable[[], int | None]) -> NoReturn:
    """Run a tool's `main` and exit with what it returns; None is 0.

    Errors of the user's, files that cannot be read or written, and Ctrl-C end it as
    `readable_errors` says. A broken pipe (`tool | head`) is not an error.
    """
    with readable_errors(Path(sys.argv[0]).name):
        try:
            code = main()
        except BrokenPipeError:
            # The interpreter flushes stdout once more at exit, which would raise again.
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123
            code = 0
        except OSError as error:
            if error.filename is None and error.errno not in NAMELESS_ERRORS:
                raise
            name = "" if error.filename is None else f"{error.filename}: "
            raise FileError(f"{name}{error.strerror}") from None
    sys.exit(code or 0)
