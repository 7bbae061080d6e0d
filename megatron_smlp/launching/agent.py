"""torchrun, with an agent that ends every failure in a new start or in one line. Decision 65.

Ranks that are well get the time to save; a failure that would come again is not repeated; the code
of the rank that failed is the agent's; ranks go on where the store is gone; no store that outlives
the run is closed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch.distributed import run
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousError,
    RendezvousGracefulExitError,
    RendezvousTimeoutError,
    dynamic_rendezvous,
)

from megatron_smlp.errors import UsageError
from megatron_smlp.launching.exit_codes import (
    AGAIN,
    CLOSED,
    FOR_GOOD,
    MISSING,
    NO_PROGRESS,
    WRONG_USE,
    end_of,
    say,
)
from megatron_smlp.launching.failures import Failures
from megatron_smlp.launching.parent import AGENT_PID
from megatron_smlp.launching.rendezvous_watch import Watch
from megatron_smlp.launching.settings import CLOSING
from megatron_smlp.megatron_patches import elastic_agent
from megatron_smlp.restart_note import RESTART, cause_of, note_cause

PATIENCE = 30
"""Seconds that ranks get to end where others are gone, so that they cannot save."""
OTHERS_END = 300.0
"""Seconds in which the ranks of other machines end after these, as torchrun's barrier has it."""
ARRIVAL = 5.0
"""Seconds that an agent which was told to end waits for the others'."""


class Agent(LocalElasticAgent):
    """An agent that runs the ranks of one machine; see the top of this file."""

    _remaining_restarts: int

    def __init__(
        self, *, spec: Any, failures: Failures, watch: Watch, closes: bool, **options: Any
    ) -> None:
        self.failures, self.watch, self.closes = failures, watch, closes
        self.code = 1
        """Exit code of this process, as far as it depends on the ranks."""
        self.hangs = False
        """Whether a rank is stuck in the kernel, so that nothing can be started here."""
        watch.agent = self
        self.rendezvous = _ReenterableRendezvous(spec.rdzv_handler, self)
        spec.rdzv_handler = self.rendezvous  # torch's launcher shuts that of its own spec down
        super().__init__(spec=spec, **options)

    def run(self, role: str = "default") -> RunResult:
        """Run as torch's agent, but end well as a spare that was not needed: torch's fails then."""
        return super().run(role) or RunResult(state=WorkerState.SUCCEEDED)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.state == WorkerState.UNHEALTHY:
            say("ranks hang in the kernel, where no signal ends them.")
            self.hangs, self._remaining_restarts = True, 0
        elif result.is_failed():
            self._decide(result)
        elif result.state == WorkerState.SUCCEEDED:
            with self.watch.patient(OTHERS_END + PATIENCE):
                if not self._others_end(OTHERS_END):
                    return RunResult(state=WorkerState.HEALTHY)  # to start again with the others
            self.code = 0
        return result

    def _others_end(self, seconds: float) -> bool:
        """Wait until the ranks of all machines have ended; return whether the run is over, and no
        machine waits to start with these again.

        One may wait that has come since, where their number varies: an agent that saw it first told
        the ranks of all to end. Or one whose ranks failed after these had ended.
        """
        rendezvous, group = self.rendezvous, self._worker_group
        varies = rendezvous.settings.min_nodes != rendezvous.settings.max_nodes
        ends = [f"{_ReenterableRendezvous.DONE}/{n}" for n in range(group.group_world_size or 1)]
        deadline = time.monotonic() + seconds
        with contextlib.suppress(RuntimeError):  # what a store that does not answer raises
            self._store.set(ends[group.group_rank or 0], "")
            while not (self._store.check(ends) or rendezvous.is_over()):
                if rendezvous.num_nodes_waiting() and (varies or not self._is_whole()):
                    return False
                if time.monotonic() > deadline:
                    break
                time.sleep(0.5)
        return True

    def _is_whole(self) -> bool:
        """Return whether no machine of this round is gone."""
        here = len(self.rendezvous._state_holder.state.participants)
        return here >= (self._worker_group.group_world_size or 0)

    def _decide(self, result: RunResult) -> None:
        """Say what failed, and whether that is the end: then no restart remains."""
        causes = [
            f"rank {rank} on {socket.gethostname()} {end_of(failure.exitcode)}"
            for rank, failure in sorted(result.failures.items(), key=lambda it: it[1].timestamp)
        ]
        codes = [failure.exitcode for failure in result.failures.values()]
        cause = causes[0]
        self.failures.add()
        self.code = next((code for code in codes if self._ends_all(code)), 1)
        if self.code == 1 and WRONG_USE in codes and self._first_machine_ended():
            self.code = WRONG_USE  # wrong there too
        if self.code == 1 and self.failures.count >= Failures.LIMIT:
            self.code = NO_PROGRESS
            say(f"{cause}; {self.failures} after {self.failures.count} failures: giving up.")
        elif self.code == 1 and self.failures.folder and self._remaining_restarts:
            say(f"{cause}; starting again: {self.failures}.")
            note_cause(cause, os.environ)
            return
        else:
            say(f"{cause}.")
        self._remaining_restarts = 0

    def _ends_all(self, code: int) -> bool:
        """Return whether a rank's exit code is the run's.

        Wrong flags are wrong on the first machine too. What another one alone refuses is of its
        own, as a driver or a mount that is missing: it may be mended, or a spare take over.
        """
        return code in FOR_GOOD and (code != WRONG_USE or self._worker_group.group_rank == 0)

    def _first_machine_ended(self) -> bool:
        """Return whether the first machine has ended the run, which it gets the time for: where
        this one meets it again at once, its ranks are ended before they can say what is wrong."""
        deadline = time.monotonic() + PATIENCE
        while not (is_over := self.rendezvous.is_over()) and time.monotonic() < deadline:
            time.sleep(0.5)
        return is_over

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        if worker_group.state == WorkerState.HEALTHY:
            cause = f"a machine came or went, seen by {socket.gethostname()}"
            say(f"{cause}; starting again.")
            note_cause(cause, os.environ)
        super()._restart_workers(worker_group)

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        """Ranks that are well can save, unless a machine of theirs is gone."""
        is_well = worker_group.state == WorkerState.HEALTHY and self._is_whole()
        self._shutdown(timeout=self._shutdown_timeout if is_well else PATIENCE)

    def _shutdown(
        self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = PATIENCE
    ) -> None:
        with self.watch.patient(2 * timeout + PATIENCE):  # torch waits once more after SIGKILL
            super()._shutdown(death_sig, timeout)

    def _exit_barrier(self) -> None:
        """Wait for nobody: `_others_end` has, whatever torch logs. Its barrier holds the connection
        of the rendezvous, so that no heartbeat passes: after 15 s a machine is taken for gone."""

    def end_as_told(self) -> bool:
        """Leave the others after a signal, which has ended the ranks; return whether they, if there
        are any, ended with 0, or knew no SIGTERM yet."""
        if self._pcontext is None or self._worker_group.state != WorkerState.HEALTHY:
            return True
        handlers = getattr(self._pcontext, "subprocess_handlers", {})
        codes = {handler.proc.poll() for handler in handlers.values()}
        if codes == {0}:  # saved, as those of all machines are: the run is over
            with contextlib.suppress(SignalException):
                self._others_end(ARRIVAL)
                self.code = 0
                self.rendezvous.shutdown()
        return codes <= {0, -signal.SIGTERM}

    def kill_ranks(self) -> None:
        """Send SIGKILL to every rank."""
        for process in self._pcontext.pids().values() if self._pcontext else ():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)


class _ReenterableRendezvous:
    """A rendezvous that a later start may enter again, and that ranks can do without.

    Torch closes it for good where an agent ends. It is closed only where this run is over, and the
    store is gone with it. In a store that lasts, an agent that ends for good tells those alone who
    have trained with it, or wait as its spares: whoever starts later begins anew.
    """

    ENDED, DONE = "ended for good", "ranks that are done"
    LOOKS = 3.0
    """Seconds within which every waiting agent has asked the store."""

    def __init__(self, handler: Any, agent: Agent) -> None:
        self.handler, self.agent = handler, agent
        self.is_lost = False
        self.round: Any = None
        """The store of those with whom this agent has trained last, or whose spare it is."""
        self.spare_of: int | None = None
        """The number of that round, of a spare."""
        self.is_new = True

    def next_rendezvous(self) -> Any:
        """Meet the others, with none of the dead among them the first time."""
        if self.is_new:
            self._see_who_lives()
            self.is_new = False
        processes = self.agent._worker_group.spec.local_world_size
        while True:
            info = self.handler.next_rendezvous()
            self.round, self.spare_of = info.store, None
            machine, machines = info.rank, info.world_size
            info.store.set(f"processes/{machine}", str(processes))
            apart = info.store.clone()  # a wait on the rendezvous' connection lets no heartbeat by
            agree_on_restart(apart, machines=machines, environment=os.environ)
            if are_alike(apart, machines=machines, processes=processes):
                return info
            say("a machine with another number of processes was refused: meeting again.")
            time.sleep(self.LOOKS)  # it leaves

    def _see_who_lives(self) -> None:
        """Wait until machines that died while they waited are dropped: they would be counted.

        Those that live beat every five seconds; the others are dropped after fifteen.
        """
        holder = self.handler._state_holder
        holder.sync()
        first = dict(holder.state.last_heartbeats)
        while not holder.state.complete and any(
            node in first and holder.state.last_heartbeats.get(node) == first[node]
            for node in holder.state.participants
        ):
            time.sleep(0.5)
            holder.sync()

    def raise_if_over(self, state: Any) -> None:
        """Note, while waiting, whose spare this agent is, and stop where nobody will come.

        Raises:
            RendezvousClosedError: one of those with whom this agent has trained will not come back.
            RendezvousGracefulExitError: this is a spare, and the run is over.
        """
        is_spare = state.complete and self.handler._this_node in state.redundancy_list
        if is_spare and state.round != self.spare_of:
            store = self.handler._get_store()
            self.round = None if self._has_ended(store) else store  # an older run is not its own
            if self.spare_of is None:
                say("a spare: this machine waits until another one is gone.")
            self.spare_of = state.round
        waits = is_spare or not state.complete
        if waits and self.round is not None and self._has_ended(self.round):
            if self.spare_of is None:
                raise RendezvousClosedError
            raise RendezvousGracefulExitError("the run is over")

    def _has_ended(self, store: Any) -> bool:
        with contextlib.suppress(RuntimeError):  # what a store that does not answer raises
            return bool(store.check([self.ENDED]))
        return False

    def is_over(self) -> bool:
        """Return whether another machine has ended the run for good."""
        if self.round is not None and self._has_ended(self.round):
            return True
        try:
            return bool(self.handler.is_closed())
        except RendezvousError:
            return True  # the store is gone, with the machine that kept it

    def num_nodes_waiting(self) -> int:
        """Return how many machines wait; 0 where the store is gone."""
        if self.is_lost:
            self.agent.watch.touch()
            return 0
        try:
            return int(self.handler.num_nodes_waiting())
        except RendezvousError:
            self.is_lost = True
            say("the rendezvous is gone; the ranks go on without it until one of them ends.")
            return 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.handler, name)

    def shutdown(self) -> bool:
        """Leave, and tell the others if the run is over; close only a store that ends with it."""
        if self.agent.code in (0, *FOR_GOOD):
            if self.agent.closes:
                is_closed = bool(self.handler.shutdown())
                # As of now: before, the state may be older than a spare that has just come.
                others_wait = self.handler._state_holder.state.redundancy_list or self.agent.code
                time.sleep(self.LOOKS if others_wait else 0)  # the store may end with this process
                return is_closed
            with contextlib.suppress(RuntimeError):
                if self.round is not None:
                    self.round.set(self.ENDED, "")
        self.handler._stop_heartbeats()
        self.round = None  # looks for nothing any more
        with contextlib.suppress(RendezvousError):
            if not self.is_lost:  # else those who meet next would count this one
                leave = dynamic_rendezvous._RendezvousExitOp()
                self.handler._op_executor.run(leave, time.monotonic() + self.LOOKS)
        return True


def are_alike(store: Any, *, machines: int, processes: int) -> bool:
    """Return whether all machines of a round start as many processes; when all have told.

    One that has lost its GPUs, as by a driver that does not load, would join with one process on
    its CPU, and all would wait for a first collective that never comes.

    Raises:
        UsageError: this one starts another number than most do.
    """
    counts = Counter(int(store.get(f"processes/{number}")) for number in range(machines))
    usual, _ = max(counts.items(), key=lambda entry: entry[::-1])  # of two halves the larger number
    if processes != usual:
        raise UsageError(
            f"NPROC_PER_NODE is {processes} here, and {usual} on the other machines: give the same "
            "on all. Where it is left out the launchers count the GPUs: see `nvidia-smi`."
        )
    return len(counts) == 1


def agree_on_restart(store: Any, *, machines: int, environment: MutableMapping[str, str]) -> None:
    """Leave the note of a restart on every machine of a round where one of them has it.

    A machine that has seen no failure, as a spare or one that comes back, would obey flags of the
    first start (--ckpt-step, --no-resume, --finetune) that the others have done with.

    Args:
        store: the round's own.
        environment: of the ranks that start next.

    Raises:
        torch.distributed.DistStoreError: another one is gone before it has answered.
    """
    note, everyone = environment.get(RESTART), "all know of restarts"
    if note:
        store.set(RESTART, note)
    if store.add("machines that know of restarts", 1) == machines:
        store.set(everyone, "")
    store.wait([everyone])
    if not note and store.check([RESTART]):
        note_cause(cause_of(store.get(RESTART).decode()), environment)


def main(words: Sequence[str]) -> int:
    """Run one agent with torchrun's command line, and return its exit code.

    Args:
        words: torchrun's, behind CLOSING where a run that is over for good closes its rendezvous.
    """
    closes = words[0] == CLOSING
    words = words[1:] if closes else words
    os.environ[AGENT_PID] = str(os.getpid())
    watch, failures = Watch(), Failures(words)

    def make_agent(**options: Any) -> Agent:
        return Agent(failures=failures, watch=watch, closes=closes, **options)

    with elastic_agent.installed(make_agent, watch.synced):
        try:
            run.run(run.parse_args(list(words)))
        except ChildFailedError:
            code = watch.agent.code if watch.agent else 1
            return code if code in FOR_GOOD else AGAIN + failures.count
        except SignalException as end:
            is_well = watch.agent is None or watch.agent.end_as_told()
            return 0 if is_well else 128 + end.sigval
        except RendezvousClosedError:
            say("another machine has ended the run for good: see its log.")
            return CLOSED
        except RendezvousTimeoutError:
            say(
                f"the other machines have not come within REJOIN_TIMEOUT, only {watch.here}: "
                "giving up. Start all again, with others in place of those that are gone."
            )
            return MISSING
        except UsageError as error:
            say(str(error))
            return WRONG_USE
        except (RendezvousError, torch.distributed.DistError, OSError, ValueError) as error:
            say(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
            return AGAIN + failures.count
    return MISSING if watch.agent and watch.agent.hangs else 0
