"""SIGTERM and SIGINT end a run well: finish the step, save, exit 0. A second SIGINT is abrupt.

Megatron's `--exit-signal-handler` does this for one signal, in lockstep over all ranks; here the
keyboard's signal takes the same way.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


@contextlib.contextmanager
def keyboard_like_sigterm(say: Callable[[str], None]) -> Iterator[None]:
    """For the time of a run, hand SIGINT to the handler that Megatron installed for SIGTERM."""
    graceful: Any = signal.getsignal(signal.SIGTERM)
    before = signal.getsignal(signal.SIGINT)

    def first(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        say("interrupted: finishing this step, then saving; interrupt again to stop at once")
        graceful(signum, frame)

    if callable(graceful):
        signal.signal(signal.SIGINT, first)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
