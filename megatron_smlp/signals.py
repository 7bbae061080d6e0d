"""Every signal that a program of ours handles.

    any program     Ctrl-C ends it, by program.py, in one line
    a training      SIGTERM, Ctrl-C, a terminal that closes, Slurm's warning: it finishes the step,
                    saves, and ends with 0; a second Ctrl-C ends it as any other program
    before the      there is nothing to save: SIGTERM ends it at once, with 0
    first step

launching/supervisor.py hands a launcher's signals on to these.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

WARNINGS = (signal.SIGHUP, signal.SIGUSR1)
"""A terminal that closes, and what `sbatch --signal=B:USR1@600` sends before a job's end."""
FINISHING = "finishing this step or evaluation, then saving what is not saved yet"

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


@contextlib.contextmanager
def held(*numbers: signal.Signals) -> Iterator[None]:
    """Keep signals until the end of the block; a process that is started in it never sees one, from
    its first instruction on. Ctrl-C reaches every process at a terminal, and a launcher's SIGTERM
    all of a rank: the rank decides."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def graceful_signals(*, announces: bool) -> Iterator[None]:
    """During a training, pass the others to the handler that Megatron has for SIGTERM.

    Args:
        announces: whether this process tells the user what happens next.
    """
    graceful: Any = signal.getsignal(signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *WARNINGS)}
    process = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:
            return  # a data loader's worker, which reads on until it is ended
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
            if before[number] == signal.SIG_DFL:  # under nohup, SIGHUP is ignored: so it stays
                signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StartUp(contextlib.AbstractContextManager["StartUp"]):
    """Before a training's first step, SIGTERM ends the process with 0.

    Until ranks train in lockstep they wait for each other in native code, for minutes where one is
    gone, and no Python handler runs meanwhile. A thread is told of the signal by the interpreter's
    own handler, through a pipe.
    """

    def __init__(self) -> None:
        self.is_over = threading.Event()
        self.before_ending: Callable[[], None] = lambda: None
        """Is called first: others may want to know that this run has ended well."""
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
        """All ranks are ready: from now on a signal finishes a step first."""
        self.is_over.set()

    def _watch(self, pipe: int) -> None:
        # A forked worker writes into the same pipe, and is told when this process is.
        while numbers := os.read(pipe, 64):
            if signal.SIGTERM in numbers and not self.is_over.is_set():
                self.before_ending()
                if os.environ.get("RANK", "0") == "0":
                    _say("SIGTERM: stopped before the first step, nothing is lost\n")
                os._exit(0)
        os.close(pipe)


def _left_to_the_thread(number: int, frame: FrameType | None) -> None:
    """Do nothing: unless Python has a handler, it writes nothing to the pipe."""


def _say(message: str) -> None:
    """Write past `print`, which may be what was interrupted and cannot be re-entered; whoever reads
    may be gone, as a terminal is that was closed."""
    with contextlib.suppress(OSError):
        os.write(2, message.encode())
