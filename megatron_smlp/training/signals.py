"""Signals end a run well: finish the step, save, exit 0. A second SIGINT is abrupt.

Megatron's `--exit-signal-handler` does this for one signal, SIGTERM, in lockstep over all ranks;
here the keyboard's takes the same way, that of a terminal that closes, and Slurm's warning. Before
the first step there is nothing to save, and SIGTERM ends a run at once, with 0.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from megatron_smlp.ctrl_c import interrupt
from megatron_smlp.launching.parent import end_with_agent

END = "finishing this step, then saving"
MESSAGE = f"interrupted: {END}; interrupt again to stop at once\n".encode()


WARNINGS = (signal.SIGHUP, signal.SIGUSR1)
"""A terminal that closes, and what `sbatch --signal=B:USR1@600` sends before a job's end."""


class StartUp(contextlib.AbstractContextManager["StartUp"]):
    """Before a run's first step, SIGTERM ends the process with 0.

    Until ranks train in lockstep they wait for each other in native code, for minutes where one is
    gone, and no Python handler runs meanwhile. A thread is told of the signal by the interpreter's
    own handler, through a pipe. A rank whose agent dies in whatever moment ends with it.
    """

    def __init__(self) -> None:
        self.is_over = threading.Event()
        self.before_ending: Callable[[], None] = lambda: None
        """Is called first: others may want to know that this run has ended well."""
        self.pipe: int | None = None

    def __enter__(self) -> StartUp:
        end_with_agent()
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
        """All ranks are ready: from now on a signal ends a run as it is said above."""
        self.is_over.set()

    def _watch(self, pipe: int) -> None:
        # A forked worker writes into the same pipe, and is told when this process is.
        while signals := os.read(pipe, 64):
            if signal.SIGTERM in signals and not self.is_over.is_set():
                self.before_ending()
                if os.environ.get("RANK", "0") == "0":
                    _say(b"SIGTERM: stopped before the first step, nothing is lost\n")
                os._exit(0)
        os.close(pipe)


def _say(message: bytes) -> None:
    """Write past `print`, which may be what was interrupted and cannot be re-entered; whoever reads
    may be gone, as a terminal is that was closed."""
    with contextlib.suppress(OSError):
        os.write(2, message)


def _left_to_the_thread(signum: int, frame: FrameType | None) -> None:
    """Do nothing: unless Python has a handler, it writes nothing to the pipe."""


@contextlib.contextmanager
def graceful_signals(*, announces: bool) -> Iterator[None]:
    """During a run, pass other signals to the handler that Megatron has for SIGTERM.

    Args:
        announces: whether this process tells the user what happens next.
    """
    graceful: Any = signal.getsignal(signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *WARNINGS)}
    process = os.getpid()

    def handle(signum: int, frame: FrameType | None) -> None:
        if os.getpid() != process:
            return  # a data loader's worker, which reads on until it is ended
        message = f"{signal.Signals(signum).name}: {END}\n".encode()
        if signum == signal.SIGINT:
            signal.signal(signal.SIGINT, interrupt)
            message = MESSAGE
        if announces:
            _say(message)
        graceful(signum, frame)

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
