"""torchrun with an agent that turns each failure into a restart or a one-line error. Decision 65.

Healthy ranks get time to save; a failure that would recur is not retried; the failed rank's exit
code becomes the agent's; ranks keep running if the store is gone; a store that outlives the run is
never closed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Sequence
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
    RendezvousTimeoutError,
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
from megatron_smlp.launching.rendezvous import DONE, Rendezvous, Watch
from megatron_smlp.launching.settings import CLOSING
from megatron_smlp.megatron_patches import elastic_agent
from megatron_smlp.restart_note import note_cause

PATIENCE = 30
"""Seconds that ranks get to end if others are gone, so that they cannot save."""
OTHERS_END = 300.0
"""Seconds within which other machines' ranks must end after these, as in torchrun's barrier."""
ARRIVAL = 5.0
"""Seconds that an agent waits, after a signal, for the ranks of other machines to end."""


class Agent(LocalElasticAgent):
    """Runs the ranks of one machine; see the module docstring."""

    _remaining_restarts: int

    def __init__(
        self,
        *,
        spec: Any,
        failures: Failures,
        watch: Watch,
        closes: bool,
        hosts: bool,
        **options: Any,
    ) -> None:
        self.hosts = hosts
        """Whether the store is on this machine, so that no other goes on without it."""
        self.failures, self.watch = failures, watch
        self.code = 1
        """Exit code of this process, as far as it depends on the ranks."""
        self.hangs = False
        """Whether a rank is stuck in the kernel, so that nothing can be started here."""
        watch.agent = self
        self.rendezvous = Rendezvous(
            spec.rdzv_handler, processes=spec.local_world_size, watch=watch, closes=closes,
            code=lambda: self.code,
        )  # fmt: skip
        spec.rdzv_handler = self.rendezvous  # torch's launcher shuts down the spec's handler
        super().__init__(spec=spec, **options)

    def run(self, role: str = "default") -> RunResult:
        """Run like torch's agent, but succeed as a spare that was not needed: torch's fails."""
        return super().run(role) or RunResult(state=WorkerState.SUCCEEDED)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.state == WorkerState.UNHEALTHY:
            say("ranks hang in the kernel and cannot be killed.")
            self.hangs, self._remaining_restarts = True, 0
        elif result.is_failed():
            self._decide(result)
        elif result.state == WorkerState.SUCCEEDED:
            with self.watch.patient(OTHERS_END + PATIENCE):
                if not self._others_end(OTHERS_END):
                    return RunResult(state=WorkerState.HEALTHY)  # to restart with the others
            self.code = 0
        return result

    def _others_end(self, seconds: float) -> bool:
        """Wait until the ranks of all machines have ended; return whether the run is over, so that
        no machine waits to restart with these.

        A machine that waits may have joined since, if their number varies: the agent that saw it
        first told the ranks of all to end. Or its ranks failed after these had ended.
        """
        rendezvous, group = self.rendezvous, self._worker_group
        varies = rendezvous.settings.min_nodes != rendezvous.settings.max_nodes
        ends = [f"{DONE}/{n}" for n in range(group.group_world_size or 1)]
        deadline = time.monotonic() + seconds
        with contextlib.suppress(RuntimeError):  # raised by a store that does not answer
            self._store.set(ends[group.group_rank or 0], "")
            while not (self._store.check(ends) or rendezvous.is_over()):
                if rendezvous.num_nodes_waiting() and (varies or not self._is_whole()):
                    return False
                if time.monotonic() > deadline:
                    break
                time.sleep(0.5)
        return True

    def _is_whole(self) -> bool:
        """Return whether all machines of this round are still there."""
        machines = self._worker_group.group_world_size or 0
        return len(self.rendezvous.state.participants) >= machines

    def _decide(self, result: RunResult) -> None:
        """Report what failed, and decide whether to restart: if not, no restart remains."""
        failures = sorted(result.failures.items(), key=lambda item: item[1].timestamp)
        rank, first = failures[0]
        cause = f"rank {rank} on {socket.gethostname()} {end_of(first.exitcode)}"
        self.failures.add()
        self.code = self._final_code([failure.exitcode for _, failure in failures])
        if self.code == 1 and self.failures.count >= Failures.LIMIT:
            self.code = MISSING if self._is_replaceable() else NO_PROGRESS
            say(f"{cause}; {self.failures} after {self.failures.count} failures: giving up.")
        elif self.code == 1 and self.failures.folder and self._remaining_restarts:
            say(f"{cause}; starting again: {self.failures}.")
            note_cause(cause, os.environ)
            return
        else:
            say(f"{cause}.")
        self._remaining_restarts = 0

    def _is_replaceable(self) -> bool:
        """Return whether the run can go on without this machine, which may be broken."""
        rendezvous = self.rendezvous
        is_least = len(rendezvous.state.participants) <= rendezvous.settings.min_nodes
        has_spare = bool(rendezvous.state.redundancy_list)
        return not self.hosts and (has_spare or not is_least)

    def _final_code(self, codes: Sequence[int]) -> int:
        """Return the run's exit code, given those of its ranks; 1 if it may restart.

        Wrong flags are wrong on the first machine too. What only another machine refuses is its own
        trouble, such as a missing driver or mount: it may be fixed, or a spare may take over.
        """
        is_first = self._worker_group.group_rank == 0
        final = [code for code in codes if code in FOR_GOOD and (is_first or code != WRONG_USE)]
        if not final and WRONG_USE in codes and self._first_machine_ended():
            return WRONG_USE
        return final[0] if final else 1

    def _first_machine_ended(self) -> bool:
        """Return whether the first machine has ended the run, after giving it time to: if this one
        rejoined at once, the first one's ranks would be ended before they say what is wrong."""
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
        """Stop the ranks; healthy ones get time to save, unless one of their machines is gone."""
        is_well = worker_group.state == WorkerState.HEALTHY and self._is_whole()
        self._shutdown(timeout=self._shutdown_timeout if is_well else PATIENCE)

    def _shutdown(
        self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = PATIENCE
    ) -> None:
        with self.watch.patient(2 * timeout + PATIENCE):  # torch waits once more after SIGKILL
            super()._shutdown(death_sig, timeout)

    def _exit_barrier(self) -> None:
        """Do not wait, whatever torch logs: `_others_end` has. torch's barrier would block the
        rendezvous' connection for heartbeats too, and after 15 s a machine counts as gone."""

    def end_signalled(self) -> bool:
        """Leave the other agents after a signal, which has ended the ranks; return whether all
        ranks, if any, ended with 0 or did not handle SIGTERM yet."""
        if self._pcontext is None or self._worker_group.state != WorkerState.HEALTHY:
            return True
        handlers = getattr(self._pcontext, "subprocess_handlers", {})
        codes = {handler.proc.poll() for handler in handlers.values()}
        if codes == {0}:  # they have saved, as on all machines: the run is over
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


def main(argv: Sequence[str]) -> int:
    """Run one agent with torchrun's command line, and return its exit code.

    Args:
        argv: torchrun's, after CLOSING if a run that is over for good is to close its rendezvous.
    """
    closes = argv[0] == CLOSING
    argv = argv[1:] if closes else argv
    hosts = any("is_host=true" in word for word in argv)  # as supervisor.py writes it
    os.environ[AGENT_PID] = str(os.getpid())
    watch, failures = Watch(), Failures(argv)

    def make_agent(**options: Any) -> Agent:
        return Agent(failures=failures, watch=watch, closes=closes, hosts=hosts, **options)

    with elastic_agent.installed(make_agent, watch.synced):
        try:
            run.run(run.parse_args(list(argv)))
        except ChildFailedError:
            code = watch.agent.code if watch.agent else 1
            return code if code in (*FOR_GOOD, MISSING) else AGAIN + failures.count
        except SignalException as end:
            is_well = watch.agent is None or watch.agent.end_signalled()
            return 0 if is_well else 128 + end.sigval
        except RendezvousClosedError:
            say("another machine has ended the run for good: see its log.")
            return CLOSED
        except RendezvousTimeoutError:
            say(
                f"the other machines did not join within REJOIN_TIMEOUT, only {watch.here}: giving "
                "up. Start all again, replacing those that are gone."
            )
            return MISSING
        except UsageError as error:
            say(str(error))
            return WRONG_USE
        except (RendezvousError, torch.distributed.DistError, OSError, ValueError) as error:
            say(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
            return AGAIN + failures.count
    return MISSING if watch.agent and watch.agent.hangs else 0
