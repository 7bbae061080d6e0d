"""Allow the --save folder one writer: rank 0 holds its lease, and tells the other ranks.

Each rename that publishes something follows a `fence`. A new holder first takes its number and then
removes the unfinished folders that it finds (folders.tidy). Between the two, the fence refuses a
rename by the old holder; after them, the rename fails.
"""

from __future__ import annotations

import argparse
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_smlp.collectives import from_first_rank, gathered
from megatron_smlp.durable import text_of
from megatron_smlp.errors import TakenOverError, UsageError
from megatron_smlp.first_rank import first_rank_first
from megatron_smlp.lease import HeldError, Lease, acquire
from megatron_smlp.restart_note import noted_cause

EXPIRY = 45.0
"""Seconds without a heartbeat after which a run is presumed dead."""
SHARING = 30.0
"""Seconds within which a file written by one machine must be visible to the others."""


@dataclass(frozen=True)
class PreviousRun:
    """What the last run in a folder left behind, for the record of a restart."""

    iteration: int
    """The last iteration that it trained, according to its last heartbeat."""
    seconds: float
    """Seconds since that heartbeat, by the file system's clock."""
    failed: bool


class SaveLease:
    """A run's right to write into its --save folder.

    Args:
        say: called with messages for the user.
    """

    def __init__(self, args: argparse.Namespace, say: Callable[[str], None]) -> None:
        self.args, self.say = args, say
        self.folder = Path(args.save) if args.save else None
        self.lease: Lease | None = None
        """On rank 0, unless the folder's file system refuses a lease."""
        self.before: PreviousRun | None = None
        """On rank 0, if there was one."""
        self.hosts: list[str] = []
        """The host name of each rank; empty if all run on one host."""

    def take(self) -> None:
        """Make this run the folder's only writer. Collective.

        Raises:
            UsageError: another run writes there, or the ranks do not share the folder.
        """
        if self.folder is None:
            return
        problem, timeout = "", 60.0 * self.args.distributed_timeout_minutes
        with first_rank_first(self.args.rank, silence=timeout):
            if self.args.rank == 0:
                try:
                    # After a restart, cut-off ranks of the attempt before may still be ending.
                    self._acquire(self.folder, patience=timeout if noted_cause() else 0.0)
                except UsageError as error:
                    problem = str(error)
        name, problem = from_first_rank((self.lease and self.lease.path.name, problem))
        if problem:
            raise UsageError(problem)
        if name:
            self._check_shared(self.folder / name)

    def _acquire(self, folder: Path, *, patience: float = 0.0) -> None:
        try:
            self.lease = acquire(folder, expiry=EXPIRY, say=self.say, patience=patience)
        except HeldError as error:
            raise UsageError(
                f"--save {folder} is being written by {error}: end that run first, or give "
                "another --save."
            ) from error
        except OSError as error:
            self.say(
                f"WARNING: {folder} cannot be leased ({text_of(error)}): nothing keeps another run "
                "from writing there."
            )
            return
        self.lease.note = {"iteration": 0, "failed": True}
        if (last := self.lease.before) is not None:
            note = {"iteration": 0, "failed": True} | dict(last.note)
            self.before = PreviousRun(note["iteration"], self.lease.silent, note["failed"])

    def _check_shared(self, path: Path) -> None:
        deadline = time.monotonic() + SHARING
        while not (is_there := path.exists()) and time.monotonic() < deadline:
            time.sleep(0.2)
        hosts = gathered((socket.gethostname(), is_there))
        names = [host for host, _ in hosts]
        self.hosts = names if len(set(names)) > 1 else []
        others = [host for host, is_there in hosts if not is_there]
        if others:
            raise UsageError(
                f"--save {self.folder} on {others[0]} is not the same folder as on {names[0]}, the "
                "first rank's machine: give one that all machines share."
            )

    def reached(self, iteration: int) -> None:
        """Record how far the run has come, in the next heartbeat.

        Raises:
            TakenOverError: a heartbeat has seen that another run took the folder over.
        """
        if self.lease:
            self.lease.note["iteration"] = iteration
            if self.lease.lost.is_set():
                self.fence()

    def fence(self) -> None:
        """Check that this run may still write.

        Raises:
            TakenOverError: another run has taken the folder over.
            OSError: the folder is gone.
        """
        if self.lease and not self.lease.is_held():
            number, holder = self.lease.successor()
            raise TakenOverError(
                f"--save {self.folder} was taken over by attempt {number} "
                f"({holder or 'another process'}) while this one, {self.lease.number}, did not "
                "answer: it can no longer save. End this run."
            )

    def release(self, *, failed: bool) -> None:
        """Leave the folder to the next run."""
        if self.lease:
            self.lease.note["failed"] = failed
            self.lease.release()
