"""Ctrl-C in all programs: a handler that is remembered, and errors that only follow from it.

A training ends by training/signals.py, which saves first; every other program by program.py, and
launchers by launching/supervisor.py.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

_interrupted = threading.Event()


def interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """Handle SIGINT as Python does, and note for `is_interruption` that it came."""
    _interrupted.set()
    raise KeyboardInterrupt


def is_interruption(error: BaseException | None) -> bool:
    """Return whether an error only follows from an interruption.

    Native code that is interrupted in a call back to Python (torch, at work on its archives) may
    let the interruption go and complain of what it left behind, such as a closed file.
    """
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None or _interrupted.is_set()


@contextlib.contextmanager
def noting_interruptions() -> Iterator[None]:
    """Let `is_interruption` know of a Ctrl-C inside, where Python's own handler is in force."""
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
