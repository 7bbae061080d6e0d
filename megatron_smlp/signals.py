"""All signal handling of our programs.

    any program     Ctrl-C ends it with one line (program.py)
    a training      SIGTERM, Ctrl-C, a closing terminal, Slurm's warning: it finishes the step,
                    saves, and exits with 0; a second Ctrl-C ends it like any other program
    before the      there is nothing to save: SIGTERM ends it at once, with 0
    first step

launching/supervisor.py forwards a launcher's signals to these handlers.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

WARNINGS = (signal.SIGHUP, signal.SIGUSR1)
"""Sent by a closing terminal, and by `sbatch --signal=B:USR1@600` before a job's end."""
FINISHING = "finishing this step or evaluation, then saving unsaved progress"

_interrupted = threading.Event()


def interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """Handle SIGINT as Python does, and record it for `is_interruption`."""
    _interrupted.set()
    raise KeyboardInterrupt


def is_interruption(error: BaseException | None) -> bool:
    """Return whether an error is only a consequence of an interruption.

    Native code interrupted in a callback into Python (such as torch writing its archives) may drop
    the interruption and raise about what it left behind, such as a closed file.
    """
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None or _interrupted.is_set()


@contextlib.contextmanager
def noting_interruptions() -> Iterator[None]:
    """Record a Ctrl-C in the block for `is_interruption`, if Python's own handler is installed."""
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


@contextlib.contextmanager
def held(*numbers: signal.Signals) -> Iterator[None]:
    """Block signals until the end of the block; a process started in it never sees them, from its
    first instruction on. Ctrl-C reaches every process of a terminal, and a launcher's SIGTERM all
    processes of a rank: this leaves the decision to the rank."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def graceful_signals(*, announces: bool) -> Iterator[None]:
    """Route SIGINT and WARNINGS to Megatron's SIGTERM handler during a training.

    Args:
        announces: whether this process tells the user what happens next.
    """
    graceful: Any = signal.getsignal(signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *WARNINGS)}
    process = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:
            return  # a data loader's worker, which keeps reading until it is killed
        message = f"{signal.Signals(number).name}: {FINISHING}\n"
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, interrupt)
            message = f"interrupted: {FINISHING}; interrupt again to stop at once\n"
        if announces:
            _say(message)
        graceful(number, frame)

    if callable(graceful):
        signal.signal(signal.SIGINT, handle)
        for number in WARNINGS:
            if before[number] == signal.SIG_DFL:  # under nohup SIGHUP is ignored; keep that
                signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StartUp(contextlib.AbstractContextManager["StartUp"]):
    """Ends the process with 0 on SIGTERM until a training's first step.

    Until then ranks wait for each other in native code, for minutes if one is gone, during which no
    Python handler runs. So a thread learns of the signal through a pipe to which the interpreter's
    C-level handler writes.
    """

    def __init__(self) -> None:
        self.began = time.time()
        self.is_over = threading.Event()
        self.before_ending: Callable[[], None] = lambda: None
        """Called before exiting, so that others learn that this run ended well."""
        self.pipe: int | None = None

    def __enter__(self) -> StartUp:
        if threading.current_thread() is threading.main_thread():
            read, self.pipe = os.pipe()
            os.set_blocking(self.pipe, False)
            signal.set_wakeup_fd(self.pipe, warn_on_full_buffer=False)
            if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
                signal.signal(signal.SIGTERM, _left_to_the_thread)
            threading.Thread(target=self._watch, args=(read,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over()
        if self.pipe is not None:
            signal.set_wakeup_fd(-1)
            os.close(self.pipe)
            if signal.getsignal(signal.SIGTERM) == _left_to_the_thread:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def over(self) -> None:
        """End the start-up, as all ranks are ready: from now on a signal finishes a step first."""
        self.is_over.set()

    def _watch(self, pipe: int) -> None:
        # A forked worker writes into the same pipe, and is signaled when this process is.
        while numbers := os.read(pipe, 64):
            if signal.SIGTERM in numbers and not self.is_over.is_set():
                self.before_ending()
                if os.environ.get("RANK", "0") == "0":
                    _say("SIGTERM: stopped before the first step, nothing is lost\n")
                os._exit(0)
        os.close(pipe)


def _left_to_the_thread(number: int, frame: FrameType | None) -> None:
    """Do nothing: Python writes to the pipe only for signals that have a Python handler."""


def _say(message: str) -> None:
    """Write to stderr without `print`, which is not reentrant and may be what was interrupted; the
    reader may be gone, like a closed terminal."""
    with contextlib.suppress(OSError):
        os.write(2, message.encode())
