"""Ends a program cleanly: errors as one line, exit codes, no worker left behind."""

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
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from megatron_smlp.errors import FileError, UserError
from megatron_smlp.signals import is_interruption, noting_interruptions
from megatron_smlp.unwritable_log import to_stderr

SPEAKER_FIRST = 30.0
"""Seconds that a silent rank leaves to the one that prints an error, before printing it itself."""


def _is_zero(variable: str) -> bool:
    """Return whether the variable that torchrun sets is 0 or unset; needs no process group."""
    return int(os.environ.get(variable, "0")) == 0


def _end_workers() -> None:
    """Kill data loader workers: they ignore SIGTERM, and exiting would wait for them forever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report their deaths
    for child in multiprocessing.active_children():
        child.kill()


@contextlib.contextmanager
def readable_errors(program: str) -> Iterator[None]:
    """Turn a UserError into one line on stderr, printed by its `speaker`, and its exit code.

    Ctrl-C, unless handled otherwise, is treated likewise, with the exit code that shells expect.
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
        _end_workers()
        speaks = _is_zero(error.speaker)
        if not speaks and not _is_zero("LOCAL_RANK") and "TORCHELASTIC_RUN_ID" in os.environ:
            # At the first rank's end torchrun ends the others, the speaker too if it is slower.
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            time.sleep(SPEAKER_FIRST)
            speaks = True  # it has not ended this rank: it may not have raised the error
        if speaks:
            machine = "" if _is_zero("RANK") else f" on {socket.gethostname()}"
            to_stderr(f"{program}{machine}: error: {error}")
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
    """Leak what an interruption left half done, which its frames hold, until the process is gone.

    A torch writer whose file was closed early complains when it is collected at shutdown, in the
    middle of an exit function, and may abort the process. A leaked reference keeps just this error
    alive; gc.freeze() would keep everything, and nanobind complains about that.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(error))


@contextlib.contextmanager
def whole_program() -> Iterator[None]:
    """Wrap a program's outermost block: after it, call the exit functions and end the process.

    Otherwise the interpreter would be torn down while native threads still run. In two of some
    hundred runs on a busy machine (torch 2.15, Python 3.13) that aborted the process, turning a
    successful run into a failed one.

    Ctrl-C is ignored from then on: it would interrupt an exit function, and has nothing to stop.
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
    threading._shutdown()  # type: ignore[attr-defined]  # executors finish what they began
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # no reader, or closed already
            stream.flush()
    os._exit(code)


# Errors that the system reports without a file name, and that are no fault of the program.
NAMELESS_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO),
    *(errno.EMFILE, errno.ENFILE),
)


def run_tool(main: Callable[[], int | None]) -> NoReturn:
    """Run a tool's `main` and exit with the code it returns; None means 0.

    User errors, files that cannot be read or written, and Ctrl-C end it as described in
    `readable_errors`. A broken pipe (`tool | head`) is not an error.
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
