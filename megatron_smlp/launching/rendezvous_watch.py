"""Notice that the rendezvous does not answer any more, and that machines are waited for.

How long a start waits for machines is in settings.py.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

from megatron_smlp.launching.exit_codes import say

SILENCE = 180.0
"""Seconds without an answer of the store after which a link is taken for cut for good. Over the
launchers' --distributed-timeout-minutes, so that what the ranks survive is survived."""
NOTICE = 45.0
"""Seconds after which those who wait for other machines say so."""


class Watch:
    """Ends the process where its main thread gets no answer for too long."""

    def __init__(self) -> None:
        self.limit, self.touched = SILENCE, time.monotonic()
        self.waiting_since: float | None = None
        self.has_said = False
        self.here = ""
        """The machines that were waiting when last looked at."""
        self.agent: Any = None
        """The Agent of agent.py, once there is one."""
        threading.Thread(target=self._watch, daemon=True).start()

    def touch(self) -> None:
        """Note that the store answers."""
        self.touched = time.monotonic()

    @contextlib.contextmanager
    def patient(self, seconds: float) -> Iterator[None]:
        """Wait longer than usual, for something that is known to take that long."""
        before, self.limit = self.limit, max(self.limit, seconds)
        try:
            yield
        finally:
            self.touch()
            self.limit = before

    def synced(self, state: Any, settings: Any) -> None:
        """See megatron_patches/elastic_agent.py."""
        self.touch()
        if self.agent and threading.current_thread() is threading.main_thread():
            self.agent.rendezvous.raise_if_over(state)
        if state.complete:
            self.waiting_since, self.has_said = None, False
            return
        self.waiting_since = self.waiting_since or time.monotonic()
        here = ", ".join(sorted(node.addr for node in state.participants))
        # An agent that gives up leaves first, and is to be named too.
        self.here = here or self.here
        if not self.has_said and time.monotonic() - self.waiting_since > NOTICE:
            self.has_said = True
            say(
                f"waiting for {settings.min_nodes} machines, {len(state.participants)} are here "
                f"({here or 'none'}): start the others, with the same rendezvous and RUN_ID="
                f"{settings.run_id}."
            )

    def _watch(self) -> None:
        while True:
            time.sleep(1.0)
            silent = time.monotonic() - self.touched
            if silent > self.limit:
                say(f"the rendezvous has not answered for {silent:.0f} s: ending this agent.")
                if self.agent:
                    self.agent.kill_ranks()
                os._exit(1)
