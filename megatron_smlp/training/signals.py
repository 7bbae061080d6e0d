"""Signals end a run well: finish the step, save, exit 0. A second SIGINT is abrupt.

Megatron's `--exit-signal-handler` does this for one signal, SIGTERM, in lockstep over all ranks;
here the keyboard's takes the same way, that of a terminal that closes, and Slurm's warning.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

from megatron_smlp.interrupts import interrupt

END = "finishing this step, then saving"
MESSAGE = f"interrupted: {END}; interrupt again to stop at once\n".encode()


WARNINGS = (signal.SIGHUP, signal.SIGUSR1)
"""A terminal that closes, and what `sbatch --signal=USR1@600` sends before a job's time is over."""


@contextlib.contextmanager
def graceful_signals(*, announces: bool) -> Iterator[None]:
    """For the time of a run, hand other signals to the handler that Megatron has for SIGTERM.

    Args:
        announces: whether this process tells the user what happens next.
    """
    graceful: Any = signal.getsignal(signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *WARNINGS)}
    process = os.getpid()

    def first(signum: int, frame: FrameType | None) -> None:
        if os.getpid() != process:
            return  # a data loader's worker, which reads on until it is ended
        signal.signal(signal.SIGINT, interrupt)
        if announces:
            os.write(2, MESSAGE)  # print() may be what was interrupted, and cannot be re-entered
        graceful(signum, frame)

    def warned(signum: int, frame: FrameType | None) -> None:
        if os.getpid() != process:
            return
        if announces:
            os.write(2, f"{signal.Signals(signum).name}: {END}\n".encode())
        graceful(signum, frame)

    if callable(graceful):
        signal.signal(signal.SIGINT, first)
        for number in WARNINGS:
            if before[number] == signal.SIG_DFL:  # under nohup, SIGHUP is ignored: so it stays
                signal.signal(number, warned)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
