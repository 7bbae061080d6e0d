"""Save checkpoints that exist only when they are whole: the steps around Megatron's writing.

1. `claim`: rank 0 makes this run the folder's only writer (claim.py), before anything is read.
2. `has_room`: each rank says whether its GPU has the memory that Megatron needs there; `start`: a
   new hidden folder, which Megatron's writers fill.
3. `add_share`: each rank leaves the checksums of its own shards in it, with --async-save in the
   process that wrote them.
4. `commit`: rank 0 adds the flags, seals the folder with checksums and marker, renames it, moves
   the tracker, and deletes what retention leaves over.

All ranks take each step together and agree on how it ended, so that a failure on one of them is a
failure on all, and nobody waits for one that is gone. The folder is shared between nodes.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch.distributed.checkpoint.api import CheckpointException

from megatron_smlp.checkpoints import integrity, retention
from megatron_smlp.checkpoints.background import add_share, in_background
from megatron_smlp.checkpoints.claim import DONE, FAILED, LIFETIME, Claim, PreviousOwner
from megatron_smlp.checkpoints.folders import (
    TRACKER,
    iteration_folder,
    iteration_of,
    partial_folder,
)
from megatron_smlp.checkpoints.model_record import model_flags
from megatron_smlp.checkpoints.room import gathers_on_gpus, missing_room
from megatron_smlp.checkpoints.run_record import run_record, write_records
from megatron_smlp.checkpoints.save_messages import left_in, reason_of, text_of, whose
from megatron_smlp.checkpoints.state import Trained, write
from megatron_smlp.checkpoints.tokenizer_copy import keep_tokenizer
from megatron_smlp.collectives import from_first_rank, gathered
from megatron_smlp.durable import remove_folder, replace_folder, write_durably
from megatron_smlp.errors import SaveError, TakenOverError, UsageError
from megatron_smlp.restart_note import noted_cause

FAILURES = (CheckpointException, SaveError)

MARGIN = 15.0
"""Seconds within which an answer reaches ranks that would wait no longer."""
SHARING = 30.0
"""Seconds in which a file of one machine is seen by the others that share its folder."""
MORE_ROOM = "Make room there, or put it back, and start the same command again"
LESS_GATHERED = (
    "Start the same command again with --distrib-optim-fully-reshardable-mem-efficient, or see "
    "docs/checkpoints.md for what else takes less"
)


class Listener(Protocol):
    """Is told how a save ended, on every rank."""

    def say(self, text: str) -> None: ...

    def saved(self, *, iteration: int, seconds: float) -> None: ...

    def found(self, before: PreviousOwner) -> None:
        """Take note of what the last run in this folder left; on rank 0 only."""


@dataclass
class Save:
    """One that was started and has not ended."""

    partial: Path
    final: Path
    began: float
    record: dict[str, Any]
    """For run.json, of when it was started: one in the background ends some steps later."""
    trouble: list[str]
    """Problems of this rank at which Megatron would leave the others waiting."""


class Saving:
    """The checkpoints of one run.

    Args:
        before_writing: is called in each process that is forked to write.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        listener: Listener,
        *,
        before_writing: Callable[[], None] = lambda: None,
    ) -> None:
        self.args = args
        self.listener = listener
        self.before_writing = before_writing
        self.cache: dict[str, Any] = {}
        """What Megatron keeps from one save to the next."""
        self.queue = AsyncCallsQueue()
        self.open: deque[Save] = deque()
        self.claimed: Claim | None = None
        """On rank 0."""
        self.hosts: list[str] = []
        """Host names of all ranks, if there is more than one rank."""
        self.unsaved = 0
        """The latest iteration that could not be saved; 0 if a later one was."""
        self.damaged: set[int] = set()
        """Iterations in --save that this run has found damaged."""

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Hold the folder during a run. It is made once: where it vanishes because a disk was
        unmounted, a new one would be on another disk.

        Raises:
            UsageError: it cannot be made.
            SaveError: at the end, if the last checkpoint could not be saved.
        """
        self._make_folder()
        outcome = FAILED
        try:
            yield
            self._raise_if_unsaved()
            outcome = DONE
        except SystemExit as end:  # as by a signal, or --exit-interval
            if not end.code:
                self._raise_if_unsaved()
                outcome = DONE
            raise
        finally:
            for call in self.queue.async_calls:  # in the background, which ends with the run
                call.async_caller.close()
            for save in self.open:
                self._remove(save)
            self.release(outcome)

    def release(self, outcome: str) -> None:
        """Leave the folder to the next run: DONE or FAILED."""
        if self.claimed:
            self.claimed.release(outcome)

    def claim(self) -> None:
        """Make this run the only writer of --save. Collective.

        Raises:
            UsageError: another run writes there, or the ranks' folders are not one.
        """
        if not self.args.save:
            return
        problem = self._take() if self._is_first_rank() else ""
        name, problem = from_first_rank((self.claimed and self.claimed.path.name, problem))
        if problem:
            raise UsageError(problem)
        if self._is_first_rank():
            self._keep_tokenizer()
        if name:
            self._check_shared(Path(self.args.save) / name)

    def _take(self) -> str:
        try:
            self.claimed = Claim(Path(self.args.save), self.listener.say, patience=self._patience())
        except UsageError as error:
            return str(error)
        except OSError as error:
            self.listener.say(
                f"WARNING: {self.args.save} cannot be claimed ({text_of(error)}): nothing keeps "
                "another run from writing there."
            )
            return ""
        if self.claimed.before:
            self.listener.found(self.claimed.before)
        return ""

    def _patience(self) -> float:
        """Return for how long a restart lets the run's old ranks end: the new ones wait in the
        collective that tells them, and the last look at a silent owner takes LIFETIME."""
        timeout = 60.0 * self.args.distributed_timeout_minutes
        return max(0.0, timeout - LIFETIME - MARGIN) if noted_cause() else 0.0

    def _check_shared(self, claim: Path) -> None:
        deadline = time.monotonic() + SHARING
        while not (is_there := claim.exists()) and time.monotonic() < deadline:
            time.sleep(0.2)
        hosts = gathered((socket.gethostname(), is_there))
        names = [host for host, _ in hosts]
        self.hosts = names if len(set(names)) > 1 else []
        if not all(found for _, found in hosts):
            other = next(host for host, found in hosts if not found)
            raise UsageError(
                f"--save {self.args.save} on {other} is not the folder of that name on "
                f"{hosts[0][0]}, where the first rank is: give one that all machines share."
            )

    def reached(self, iteration: int) -> None:
        """Note how far the run is.

        Raises:
            TakenOverError: another run has taken the folder over in the meantime.
        """
        if self.claimed:
            self.claimed.iteration = iteration
            if self.claimed.is_lost:
                self.claimed.check()

    def _fence(self) -> None:
        if self.claimed:
            self.claimed.check()

    def _make_folder(self) -> None:
        if self.args.save and self._is_first_rank():
            try:
                Path(self.args.save).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UsageError(
                    f"--save {self.args.save} cannot be made: {error.strerror}. Give a folder that "
                    "can be written to."
                ) from error

    def _keep_tokenizer(self) -> None:
        try:
            keep_tokenizer(self.args, Path(self.args.save))
        except OSError as error:
            self.listener.say(f"WARNING: the tokenizer is not copied: {text_of(error)}")

    def _raise_if_unsaved(self) -> None:
        if self.unsaved:
            raise SaveError(
                f"the last checkpoint, of iteration {self.unsaved}, could not be saved to "
                f"{self.args.save}: {left_in(Path(self.args.save))}."
            )

    def save(self, parts: Trained, iteration: int) -> None:
        """Save a training; with --async-save files are written while it goes on. Collective.

        Raises:
            SaveError: on every rank, where --on-save-failure is stop.
        """
        if gathers_on_gpus(self.args) and not self.has_room(
            iteration, missing_room(parts.optimizer)
        ):
            return
        try:
            folder = self.start(iteration_folder(self.args.save, iteration))
            request = write(parts, folder, iteration=iteration, cache=self.cache)
            if request is None:
                add_share(folder, self.args.rank)
                self.commit()
            else:
                rank, first = self.args.rank, self.before_writing
                request = in_background(request, folder, rank, first=first, commit=self.commit)
                self.queue.schedule_async_request(request)
        except FAILURES as error:
            self.failed(self.open[-1], error)

    def finish(self, *, blocking: bool = False) -> None:
        """Commit what was written in the background; `blocking` waits for all of it. Collective.

        Raises:
            SaveError: as `save`.
        """
        while True:
            try:
                self.queue.maybe_finalize_async_calls(blocking, no_dist=False)
                return
            except FAILURES as error:
                self.failed(self.open[0], error)  # and on with the next in the queue

    def has_room(self, iteration: int, problem: str) -> bool:
        """Return whether no rank lacks the memory for a save that is not started yet. Collective.

        Raises:
            SaveError: on every rank, where --on-save-failure is stop.
        """
        final = iteration_folder(self.args.save, iteration)
        save = Save(partial_folder(final), final, time.perf_counter(), record={}, trouble=[])
        self.open.append(save)
        try:
            self._agree([problem] if problem else [])
        except SaveError as error:
            self.failed(save, error, remedy=LESS_GATHERED)
            return False
        self.open.pop()
        return True

    def start(self, final: Path) -> Path:
        """Make the folder that is to be filled. Collective.

        Raises:
            SaveError: on every rank.
        """
        partial, problem = partial_folder(final), None
        if self._is_first_rank():
            try:
                partial.mkdir()
            except OSError as error:
                problem = f"{partial.parent}: {error.strerror}"
        partial, problem = from_first_rank((partial, problem))
        is_first, iteration = self._is_first_rank(), iteration_of(final)
        record = run_record(self.args, iteration=iteration) if is_first else {}
        self.open.append(Save(partial, final, time.perf_counter(), record, trouble=[]))
        self._agree([problem] if problem else [])
        return partial

    def note(self, error: OSError) -> None:
        """Remember a problem of this rank alone, for `commit` to tell the others."""
        self.open[0].trouble.append(text_of(error))

    def commit(self) -> None:
        """Seal the oldest save and give it its name. Collective, when all shards are written.

        Raises:
            SaveError: on every rank; what had the name before is still there.
        """
        save = self.open[0]
        self._agree(save.trouble)
        self._agree(self._publish(save) if self._is_first_rank() else [])
        self.open.popleft()
        seconds = time.perf_counter() - save.began
        iteration = iteration_of(save.final) or 0
        if iteration >= self.unsaved:
            self.unsaved = 0
        self.listener.saved(iteration=iteration, seconds=seconds)

    def _publish(self, save: Save) -> Sequence[str | TakenOverError]:
        try:
            write_records(save.partial, model_flags(self.args), save.record)
            integrity.seal(save.partial)
            self._fence()
            replace_folder(save.partial, save.final)
            iteration = iteration_of(save.final)
            tracked = save.final.name if iteration is None else str(iteration)
            write_durably(save.final.parent / TRACKER, tracked, before_rename=self._fence)
            self._fence()  # after a takeover the new owner decides what is deleted
        except TakenOverError as error:
            return [error]
        except OSError as error:
            return [text_of(error)]
        if iteration is not None and save.final.parent == Path(self.args.save):
            self.damaged.discard(iteration)
            run, last, every = self.args.save, self.args.keep_last, self.args.keep_every
            doomed = retention.superfluous(
                run, newest=iteration, last=last, every=every, damaged=self.damaged
            )
            for problem in retention.delete(run, doomed):
                self.listener.say(problem)
        return []

    def failed(self, save: Save, error: BaseException, *, remedy: str = MORE_ROOM) -> None:
        """Clean up after a save; say so, or end the run. Called on every rank.

        Raises:
            SaveError: where --on-save-failure is stop.
            TakenOverError: another run has removed what this one was writing.
        """
        self.open.remove(save)
        self._remove(save)
        with contextlib.suppress(OSError):  # a folder that is gone, which the message is about
            self._fence()
        iteration = iteration_of(save.final) or 0
        # One that was started earlier may end later, in the background.
        self.unsaved = max(self.unsaved, iteration)
        message = (
            f"iteration {iteration} could not be saved to {save.final.parent}: "
            f"{reason_of(error, self.hosts)}; {left_in(save.final.parent)}"
        )
        if self.args.on_save_failure == "stop":
            raise SaveError(
                f"{message}. {remedy}, or let a run go on without by --on-save-failure continue."
            ) from error
        self.listener.say(f"{message}. The run goes on (--on-save-failure continue)")

    def _remove(self, save: Save) -> None:
        if self._is_first_rank():
            with contextlib.suppress(OSError):
                remove_folder(save.partial)

    def _agree(self, problems: Sequence[str | TakenOverError]) -> None:
        """Raise on every rank where one has a problem. Collective."""
        for rank, found in enumerate(gathered(list(problems))):
            if found and isinstance(found[0], TakenOverError):
                raise found[0]
            if found:
                raise SaveError(f"{found[0]}{whose(rank, self.hosts)}")

    def _is_first_rank(self) -> bool:
        return bool(self.args.rank == 0)
