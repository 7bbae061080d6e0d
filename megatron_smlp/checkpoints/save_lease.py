"""One writer in the folder of --save: its lease, on rank 0, and what all ranks have to know of it.

A rename that publishes something comes after `fence`. A new holder first takes its number and then
removes the unfinished folders that it finds (folders.tidy): a rename of the old holder's fails
after that, and is refused before it.
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
"""Seconds without a heartbeat after which a run is taken for dead."""
SHARING = 30.0
"""Seconds in which a file of one machine is seen by the others that share its folder."""


@dataclass(frozen=True)
class PreviousRun:
    """What the last run in a folder left behind, for the record of a restart."""

    iteration: int
    """The last one that it trained, as of its last heartbeat."""
    seconds: float
    """Seconds since that, by the clock of the file system."""
    failed: bool


class SaveLease:
    """The right of a run to write into its --save folder.

    Args:
        say: is told what the user should know.
    """

    def __init__(self, args: argparse.Namespace, say: Callable[[str], None]) -> None:
        self.args, self.say = args, say
        self.folder = Path(args.save) if args.save else None
        self.lease: Lease | None = None
        """On rank 0; None where the folder's file system refuses it, too."""
        self.before: PreviousRun | None = None
        """On rank 0."""
        self.hosts: list[str] = []
        """Host names of all ranks, if there is more than one host."""

    def take(self) -> None:
        """Make this run the folder's only writer. Collective.

        Raises:
            UsageError: another run writes there, or the ranks' folders are not one.
        """
        if self.folder is None:
            return
        problem, timeout = "", 60.0 * self.args.distributed_timeout_minutes
        with first_rank_first(self.args.rank, silence=timeout):
            if self.args.rank == 0:
                try:
                    # Of a run that is started again, ranks that are cut off from it may still end.
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
                f"--save {self.folder} on {others[0]} is not the folder of that name on "
                f"{names[0]}, where the first rank is: give one that all machines share."
            )

    def reached(self, iteration: int) -> None:
        """Note how far the run is, in the next heartbeat.

        Raises:
            TakenOverError: another run was seen to have taken the folder over.
        """
        if self.lease:
            self.lease.note["iteration"] = iteration
            if self.lease.lost.is_set():
                self.fence()

    def fence(self) -> None:
        """Make sure that this run may still write.

        Raises:
            TakenOverError: another one has taken the folder over.
            OSError: the folder is gone.
        """
        if self.lease and not self.lease.is_held():
            number, holder = self.lease.successor()
            raise TakenOverError(
                f"--save {self.folder} was taken over by attempt {number} "
                f"({holder or 'another process'}) while this one, {self.lease.number}, did not "
                "answer: nothing is saved by it any more. End this run."
            )

    def release(self, *, failed: bool) -> None:
        """Leave the folder to the next run."""
        if self.lease:
            self.lease.note["failed"] = failed
            self.lease.release()
