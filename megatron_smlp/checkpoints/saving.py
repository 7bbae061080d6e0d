"""Save checkpoints that become visible only when complete: the steps around Megatron's writing.

1. `take_folder`: this run becomes the folder's only writer (save_lease.py), before it reads.
2. `save`: each rank reports whether its GPU has the memory that Megatron needs (gpu_memory.py);
   `_start`: rank 0 makes a new hidden folder, which Megatron's writers fill.
3. `add_share`: each rank leaves the checksums of its own shards in it, with --async-save from the
   process that wrote them.
4. `commit`: rank 0 adds the flags, seals the folder with checksums and marker, renames it, moves
   the tracker, and deletes what --keep-last does not keep.

All ranks take each step in lockstep and agree on how it ended, so that a failure on one of them is
a failure on all, and no rank waits for one that is gone. The folder is shared between nodes.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import re
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch.distributed.checkpoint.api import CheckpointException

from megatron_smlp.checkpoints import integrity
from megatron_smlp.checkpoints.folders import (
    TRACKER,
    iteration_folder,
    latest_iteration,
    partial_folder,
    superfluous,
)
from megatron_smlp.checkpoints.gpu_memory import gathers_on_gpus, missing_room
from megatron_smlp.checkpoints.model_record import model_flags
from megatron_smlp.checkpoints.run_record import run_record, write_records
from megatron_smlp.checkpoints.save_lease import PreviousRun, SaveLease
from megatron_smlp.checkpoints.state import Trained, write
from megatron_smlp.checkpoints.tokenizer_copy import keep_tokenizer
from megatron_smlp.collectives import from_first_rank, gathered
from megatron_smlp.durable import remove_folder, replace_folder, text_of, write_durably
from megatron_smlp.errors import NonFiniteLossError, SaveError, TakenOverError, UsageError
from megatron_smlp.signals import held

FAILURES = (CheckpointException, SaveError)

CUT_SHORT = "was only partly written, as on a full disk"
MORE_ROOM = "Free space there, or restore it, and rerun the same command"
LESS_GATHERED = (
    "Rerun the same command with --distrib-optim-fully-reshardable-mem-efficient, or see "
    "docs/checkpoints.md for what else saves memory"
)


class SaveObserver(Protocol):
    """Receives the outcome of each save, on every rank."""

    def say(self, text: str) -> None: ...

    def saved(self, *, iteration: int, seconds: float) -> None: ...

    def found(self, before: PreviousRun) -> None:
        """Record what the last run in this folder left; called on rank 0 only."""


@dataclass
class Save:
    """A save that has started and has not ended."""

    iteration: int
    final: Path
    partial: Path
    began: float
    record: dict[str, Any]
    """For run.json, as of the start: a save in the background ends some steps later."""
    trouble: list[str]
    """Problems of this rank alone, on which Megatron would leave the others waiting."""


class Saving:
    """The checkpoints of one run.

    Args:
        before_writing: called in each process that is forked to write.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        observer: SaveObserver,
        *,
        before_writing: Callable[[], None] = lambda: None,
    ) -> None:
        self.args, self.observer = args, observer
        self.is_first_rank = args.rank == 0
        self.before_writing = before_writing
        self.cache: dict[str, Any] = {}
        """What Megatron keeps from one save to the next."""
        self.queue = AsyncCallsQueue()
        self.open: deque[Save] = deque()
        self.lease = SaveLease(args, observer.say)
        self.unsaved = 0
        """The latest iteration that could not be saved; 0 if a later one was."""

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Hold the folder during a run. It is created only once: if it vanishes because a disk was
        unmounted, a new one would be on another disk.

        Raises:
            UsageError: it cannot be created.
            SaveError: at the end, if the last checkpoint could not be saved.
        """
        self._make_folder()
        failed = True
        try:
            yield
            self._raise_if_unsaved()
            failed = False
        except NonFiniteLossError:  # raised on all ranks: they can still commit what they wrote
            self.finish(blocking=True)
            raise
        except UsageError:  # of data, before the first step: the next start is no restart
            failed = False
            raise
        finally:
            for call in self.queue.async_calls:  # background writers end with the run
                call.async_caller.close()
            for save in self.open:
                self._remove(save)
            self.lease.release(failed=failed)

    def take_folder(self) -> None:
        """Make this run the only writer of --save. Collective.

        Raises:
            UsageError: another run writes there, or the ranks do not share the folder.
        """
        self.lease.take()
        if self.lease.before:
            self.observer.found(self.lease.before)
        if self.args.save and self.is_first_rank:
            self._keep_tokenizer()

    def _make_folder(self) -> None:
        if self.args.save and self.is_first_rank:
            try:
                Path(self.args.save).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UsageError(
                    f"--save {self.args.save} cannot be created: {error.strerror}. Give a writable "
                    "folder."
                ) from error

    def _keep_tokenizer(self) -> None:
        try:
            keep_tokenizer(self.args, Path(self.args.save))
        except OSError as error:
            self.observer.say(f"WARNING: tokenizer not copied: {text_of(error)}")

    def _raise_if_unsaved(self) -> None:
        if self.unsaved:
            raise SaveError(
                f"the last checkpoint, of iteration {self.unsaved}, could not be saved to "
                f"{self.args.save}: {left_in(Path(self.args.save))}."
            )

    def save(self, parts: Trained, iteration: int) -> None:
        """Save the training; with --async-save it goes on while files are written. Collective.

        Raises:
            SaveError: on every rank, if --on-save-failure is stop.
        """
        if gathers_on_gpus(self.args):
            problem = missing_room(parts.optimizer)
            try:
                self._agree([problem] if problem else [])
            except SaveError as error:
                self._report(iteration, error, remedy=LESS_GATHERED)
                return
        try:
            folder = self._start(iteration)
            request = write(parts, folder, iteration=iteration, cache=self.cache)
            if request is None:
                add_share(folder, self.args.rank)
                self.commit()
            else:
                with held(signal.SIGINT):
                    self.queue.schedule_async_request(self._in_background(request, folder))
        except FAILURES as error:
            self._give_up(self.open[-1], error)

    def _in_background(self, request: Any, folder: Path) -> Any:
        """Return Megatron's request with our steps added: a process forked for this save writes
        (decision 21); when those of all ranks are done, this process commits."""
        request.finalize_fns.append(self.commit)
        if request.async_fn is None:  # nothing to write on this rank
            return request
        write = functools.partial(
            write_and_add_share, request.async_fn, folder, self.args.rank, self.before_writing
        )
        return request._replace(async_fn=write)

    def finish(self, *, blocking: bool = False) -> float:
        """Commit what was written in the background; `blocking` waits for all of it. Collective.

        Returns:
            the seconds that it took, if a save ended; else 0.

        Raises:
            SaveError: as `save`.
        """
        began, open_before = time.perf_counter(), len(self.open)
        while True:
            try:
                self.queue.maybe_finalize_async_calls(blocking, no_dist=False)
                return time.perf_counter() - began if len(self.open) < open_before else 0.0
            except FAILURES as error:
                self._give_up(self.open[0], error)  # then go on with the next in the queue

    def _start(self, iteration: int) -> Path:
        """Make the folder to write into. Collective."""
        final = iteration_folder(self.args.save, iteration)
        partial, problem, record = partial_folder(final), "", {}
        if self.is_first_rank:
            record = run_record(self.args, iteration=iteration)
            try:
                partial.mkdir()
            except OSError as error:
                problem = f"{partial.parent}: {error.strerror}"
        partial = from_first_rank(partial)
        self.open.append(Save(iteration, final, partial, time.perf_counter(), record, trouble=[]))
        self._agree([problem] if problem else [])
        return partial

    def note(self, error: OSError) -> None:
        """Remember a problem of this rank alone, for `commit` to tell the others."""
        self.open[0].trouble.append(text_of(error))

    def commit(self) -> None:
        """Seal the oldest save and rename it, once all its shards are written. Collective.

        Raises:
            SaveError: on every rank; an older checkpoint of that name is still there.
        """
        save = self.open[0]
        self._agree(save.trouble)
        self._agree(self._publish(save) if self.is_first_rank else [])
        self.open.popleft()
        if save.iteration >= self.unsaved:
            self.unsaved = 0
        seconds = time.perf_counter() - save.began
        self.observer.saved(iteration=save.iteration, seconds=seconds)

    def _publish(self, save: Save) -> Sequence[str | TakenOverError]:
        try:
            write_records(save.partial, model_flags(self.args), save.record)
            integrity.seal(save.partial)
            self.lease.fence()
            replace_folder(save.partial, save.final)
            tracker = save.final.parent / TRACKER
            write_durably(tracker, str(save.iteration), before_rename=self.lease.fence)
            self.lease.fence()  # after a takeover the new holder decides what is deleted
        except TakenOverError as error:
            return [error]
        except OSError as error:
            return [text_of(error)]
        last, every = self.args.keep_last, self.args.keep_every
        for folder in superfluous(self.args.save, newest=save.iteration, last=last, every=every):
            try:
                remove_folder(folder)
            except OSError as error:
                self.observer.say(f"{folder} could not be deleted: {error.strerror}")
        return []

    def _give_up(self, save: Save, error: Exception) -> None:
        """Clean up after a failed save, then report it or end the run. Called on every rank.

        Raises:
            SaveError: if --on-save-failure is stop.
            TakenOverError: another run has removed what this one was writing.
        """
        self.open.remove(save)
        self._remove(save)
        with contextlib.suppress(OSError):  # the folder is gone: `error` says so
            self.lease.fence()
        self._report(save.iteration, error, remedy=MORE_ROOM)

    def _report(self, iteration: int, error: Exception, *, remedy: str) -> None:
        # In the background, a save that was started earlier may end later.
        self.unsaved = max(self.unsaved, iteration)
        message = (
            f"iteration {iteration} could not be saved to {self.args.save}: "
            f"{reason_of(error, self.lease.hosts)}; {left_in(Path(self.args.save))}"
        )
        if self.args.on_save_failure == "stop":
            raise SaveError(
                f"{message}. {remedy}, or continue unsaved with --on-save-failure continue."
            ) from error
        self.observer.say(f"{message}. The run continues (--on-save-failure continue)")

    def _remove(self, save: Save) -> None:
        if self.is_first_rank:
            with contextlib.suppress(OSError):
                remove_folder(save.partial)

    def _agree(self, problems: Sequence[str | TakenOverError]) -> None:
        """Raise on every rank if any has a problem. Collective."""
        for rank, errors in enumerate(gathered(list(problems))):
            if errors and isinstance(errors[0], TakenOverError):
                raise errors[0]
            if errors:
                raise SaveError(f"{errors[0]}{whose(rank, self.lease.hosts)}")


def left_in(run: Path) -> str:
    left = latest_iteration(run)
    if left is None:
        return "no checkpoint exists yet"
    return f"the newest is of iteration {left}"


def reason_of(error: BaseException, hosts: Sequence[str]) -> str:
    """Return the innermost message of an error that torch and Megatron wrap several times.

    Args:
        hosts: the host of each rank, to name the one that failed.
    """
    failures: dict[int, Any] = getattr(error, "failures", None) or {}
    rank, inner = next(
        ((rank, str(failure[0])) for rank, failure in failures.items()), (None, str(error))
    )
    owner = "" if rank is None else whose(rank, hosts)
    text = re.split(r"error: ", " ".join(inner.split()))[-1][:300]
    # On a full disk, torch's archives report a wrong position instead of the system's error.
    return re.sub(r"\[enforce fail at inline_container.*", CUT_SHORT, text) + owner


def whose(rank: int, hosts: Sequence[str]) -> str:
    return f" (rank {rank} on {hosts[rank]})" if hosts else ""


def add_share(partial: Path, rank: int) -> None:
    """Leave the checksums of this rank's shards; if that fails, `commit` computes them."""
    with contextlib.suppress(OSError):
        integrity.write_share(partial, rank=rank)


def write_and_add_share(
    write: Callable[..., Any],
    partial: Path,
    rank: int,
    first: Callable[[], None],
    *args: Any,
    **kwargs: Any,
) -> None:
    """Write shards, then leave their checksums: the body of a forked writer process."""
    first()
    try:
        write(*args, **kwargs)
    except Exception as error:
        args[-1].put(RuntimeError(repr(error)))  # its queue: nothing else tells the trainer
        return
    add_share(partial, rank)
