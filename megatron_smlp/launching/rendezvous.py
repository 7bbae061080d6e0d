"""The agents' rendezvous: torch's, but a later start can rejoin, and ranks can do without it.

Decision 65 has what torch lacks, and measurements. How long a start waits is in settings.py.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousError,
    RendezvousGracefulExitError,
    dynamic_rendezvous,
)

from megatron_smlp.errors import UsageError
from megatron_smlp.launching.exit_codes import FOR_GOOD, say
from megatron_smlp.restart_note import RESTART, cause_of, note_cause

SILENCE = 180.0
"""Seconds without an answer of the store after which a link is presumed cut for good. Longer than
the launchers' --distributed-timeout-minutes, so that an agent survives what its ranks survive."""
NOTICE = 45.0
"""Seconds after which an agent that waits for other machines says so."""
LOOKS = 3.0
"""Seconds within which every waiting agent has polled the store."""
ENDED, DONE = "ended for good", "ranks that are done"
"""Keys in the store of a round."""


class Watch:
    """Ends the process if its main thread gets no answer from the store for too long."""

    def __init__(self) -> None:
        self.limit, self.touched = SILENCE, time.monotonic()
        self.waiting_since: float | None = None
        self.has_said = False
        self.here = ""
        """The machines that were waiting at the last look."""
        self.agent: Any = None
        """The Agent of agent.py, once there is one."""
        threading.Thread(target=self._watch, daemon=True).start()

    def touch(self) -> None:
        """Record that the store has answered."""
        self.touched = time.monotonic()

    @contextlib.contextmanager
    def patient(self, seconds: float) -> Iterator[None]:
        """Raise the limit within the block, for something that is known to take that long."""
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
        # An agent that gives up leaves first: keep the last names, which include its own.
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


class Rendezvous:
    """Wraps torch's handler, which closes for good when an agent ends.

    This one closes only when the run is over and the store ends with it. In a store that lasts, an
    agent that ends for good tells only the machines that have trained with it, or wait as its
    spares: whoever starts later starts afresh.

    Args:
        processes: number of ranks on this machine.
        closes: whether the store ends with this run.
        code: returns this agent's exit code as it stands.
    """

    def __init__(
        self, handler: Any, *, processes: int, watch: Watch, closes: bool, code: Callable[[], int]
    ) -> None:
        self.handler, self.processes, self.watch = handler, processes, watch
        self.closes, self.code = closes, code
        self.is_lost = False
        self.round: Any = None
        """The store of the round in which this agent last trained, or whose spare it is."""
        self.spare_of: int | None = None
        """The number of that round, if this agent is a spare."""
        self.is_new = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self.handler, name)

    @property
    def state(self) -> Any:
        """The state of the rendezvous when the store was last read."""
        return self.handler._state_holder.state

    def next_rendezvous(self) -> Any:
        """Join the others; the first time, once dead machines are no longer among them."""
        if self.is_new:
            self._see_who_lives()
            self.is_new = False
        while True:
            info = self.handler.next_rendezvous()
            self.round, self.spare_of = info.store, None
            info.store.set(f"processes/{info.rank}", str(self.processes))
            apart = info.store.clone()  # a wait on the rendezvous' connection blocks heartbeats
            agree_on_restart(apart, machines=info.world_size, environment=os.environ)
            if are_alike(apart, machines=info.world_size, processes=self.processes):
                return info
            say("a machine with a different process count was refused: rejoining.")
            time.sleep(LOOKS)  # until it has left

    def _see_who_lives(self) -> None:
        """Wait until machines that died while they waited are dropped; else they would be counted.

        Live machines send a heartbeat every five seconds; the others are dropped after fifteen.
        """
        sync = self.handler._state_holder.sync
        sync()
        first = dict(self.state.last_heartbeats)
        while not self.state.complete and any(
            node in first and self.state.last_heartbeats.get(node) == first[node]
            for node in self.state.participants
        ):
            time.sleep(0.5)
            sync()

    def raise_if_over(self, state: Any) -> None:
        """While waiting, record whose spare this agent is, and stop if nobody will come.

        Raises:
            RendezvousClosedError: a machine that this agent has trained with will not come back.
            RendezvousGracefulExitError: this is a spare, and the run is over.
        """
        is_spare = state.complete and self.handler._this_node in state.redundancy_list
        if is_spare and state.round != self.spare_of:
            store = self.handler._get_store()
            self.round = None if _has(store, ENDED) else store  # ENDED is an older run's
            if self.spare_of is None:
                say("a spare: waiting until another machine is gone.")
            self.spare_of = state.round
        waits = is_spare or not state.complete
        if waits and self.round is not None and _has(self.round, ENDED):
            if self.spare_of is None:
                raise RendezvousClosedError
            raise RendezvousGracefulExitError("the run is over")

    def is_over(self) -> bool:
        """Return whether another machine has ended the run for good."""
        if self.round is not None and _has(self.round, ENDED):
            return True
        try:
            return bool(self.handler.is_closed())
        except RendezvousError:
            return True  # the store is gone, with the machine that kept it

    def num_nodes_waiting(self) -> int:
        """Return how many machines wait; 0 if the store is gone."""
        if self.is_lost:
            self.watch.touch()
            return 0
        try:
            return int(self.handler.num_nodes_waiting())
        except RendezvousError:
            self.is_lost = True
            say("the rendezvous is gone; the ranks continue without it until one ends.")
            return 0

    def shutdown(self) -> bool:
        """Leave, and tell the others if the run is over; close only a store that ends with it."""
        is_over = self.code() in (0, *FOR_GOOD)
        if is_over and self.closes:
            is_closed = bool(self.handler.shutdown())
            # Read only now: until the shutdown, the state may predate a spare that has just come.
            others_wait = self.state.redundancy_list or self.code()
            time.sleep(LOOKS if others_wait else 0)  # the store may end with this process
            return is_closed
        if is_over and self.round is not None:
            with contextlib.suppress(RuntimeError):
                self.round.set(ENDED, "")
        self.handler._stop_heartbeats()
        self.round = None  # so that nothing reads it any more
        if not self.is_lost:  # a machine that does not leave is counted in the next round
            with contextlib.suppress(RendezvousError):
                leave = dynamic_rendezvous._RendezvousExitOp()
                self.handler._op_executor.run(leave, time.monotonic() + LOOKS)
        return True


def _has(store: Any, key: str) -> bool:
    with contextlib.suppress(RuntimeError):  # raised by a store that does not answer
        return bool(store.check([key]))
    return False


def are_alike(store: Any, *, machines: int, processes: int) -> bool:
    """Return whether all machines of a round start the same number of processes; wait for all.

    A machine that has lost its GPUs, for example to a driver that does not load, would join with
    one process on its CPU, and all would wait for a first collective that never comes.

    Raises:
        UsageError: this machine starts a different number than most do.
    """
    counts = Counter(int(store.get(f"processes/{number}")) for number in range(machines))
    usual, _ = max(counts.items(), key=lambda entry: entry[::-1])  # in a tie the larger number
    if processes != usual:
        raise UsageError(
            f"NPROC_PER_NODE is {processes} here, and {usual} on the other machines: give the same "
            "on all. If it is unset, the launchers count the GPUs: see `nvidia-smi`."
        )
    return len(counts) == 1


def agree_on_restart(store: Any, *, machines: int, environment: MutableMapping[str, str]) -> None:
    """Leave the note of a restart on every machine of a round if one of them has it.

    A machine that has seen no failure, such as a spare or one that comes back, would obey flags of
    the first start (--ckpt-step, --no-resume, --finetune) that the others are done with.

    Args:
        store: the round's own.
        environment: of the ranks that start next.

    Raises:
        torch.distributed.DistStoreError: another machine is gone before it has answered.
    """
    note, everyone = environment.get(RESTART), "all know of restarts"
    if note:
        store.set(RESTART, note)
    if store.add("machines that know of restarts", 1) == machines:
        store.set(everyone, "")
    store.wait([everyone])
    if not note and store.check([RESTART]):
        note_cause(cause_of(store.get(RESTART).decode()), environment)
