"""SIGTERM and SIGINT end a run well: finish the step, save, exit 0. A second SIGINT is abrupt.

Megatron's `--exit-signal-handler` does this for one signal, in lockstep over all ranks; here the
keyboard's signal takes the same way.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

from megatron_smlp.errors import interrupt

MESSAGE = b"interrupted: finishing this step, then saving; interrupt again to stop at once\n"


@contextlib.contextmanager
def keyboard_like_sigterm(*, speaks: bool) -> Iterator[None]:
    """For the time of a run, hand SIGINT to the handler that Megatron installed for SIGTERM.

    Args:
        speaks: whether this process tells the user what happens next.
    """
    graceful: Any = signal.getsignal(signal.SIGTERM)
    before = signal.getsignal(signal.SIGINT)
    process = os.getpid()

    def first(signum: int, frame: FrameType | None) -> None:
        if os.getpid() != process:
            return  # a data loader's worker, which reads on until it is ended
        signal.signal(signal.SIGINT, interrupt)
        if speaks:
            os.write(2, MESSAGE)  # print() may be what was interrupted, and cannot be re-entered
        graceful(signum, frame)

    if callable(graceful):
        signal.signal(signal.SIGINT, first)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
