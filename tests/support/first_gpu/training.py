"""Short trainings inside a case's process, and what is watched in them. No torch until one runs."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import socket
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from support.first_gpu.notes import Notes, Place
from support.launches import Step, steps
from support.runs import ending_well, forget_run
from support.systems import MODEL, SYSTEMS

NUM_STEPS = 4
BETWEEN = 2
"""The step after which a run is interrupted."""
WAIT = "called a synchronizing CUDA operation"

type Around = Callable[[], contextlib.AbstractContextManager[object]]


def words(place: Place, system: str, *, precision: str = "--bf16") -> str:
    """Flags of a system's run; weights are drawn on the CPU, as on every device."""
    run = f"--train-iters {NUM_STEPS} --use-cpu-initialization --distributed-timeout-minutes 2"
    return f"{MODEL} {SYSTEMS[system]} {place.size} {precision} {run}"


def train(flags: str, folder: Path, *, around: Around = contextlib.nullcontext) -> list[Step]:
    """Train in this process, as pretrain_smlp.py does with these flags; return the logged steps.

    around: is entered when Megatron is imported and patched.
    """
    from megatron_smlp.training.captured_output import CapturedOutput
    from pretrain_smlp import patched_arguments
    from pretrain_smlp import train as pretrain

    argv = [*flags.split(), "--log-dir", str(folder)]
    try:
        with ending_well(), CapturedOutput() as output:
            args = patched_arguments(argv)
            output.open(args.log_dir, rank=args.rank)
            with around():
                pretrain(args)
    finally:
        forget_run()
    return steps(folder) if args.rank == 0 else []


def interrupted(flags: str, folder: Path) -> list[Step]:
    """The steps of a run that ends after BETWEEN of them, and goes on in a second call."""
    saved = f"{flags} --save {folder / 'checkpoints'}"
    before = train(f"{saved} --exit-interval {BETWEEN}", folder / "before")
    return before + train(saved, folder / "after")


class Watch:
    """Counts the waits of the host for the device in a step, from the second one
    on: the first allocates and compiles, and what a log line reads comes after it.

    Torch warns of what it reads or copies, not of who waits for an event or for the whole device,
    and it names its own line where somebody waits for a stream.
    """

    def __init__(self) -> None:
        self.lines: Counter[str] = Counter()
        """Source lines that waited, and how often."""
        self.steps = 0
        self.is_on = False

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        import torch

        from megatron_smlp.megatron_patches.wrapping import wrapped_in
        from megatron_smlp.training.step import Step

        with wrapped_in(
            (warnings, "showwarning", self._counting),
            (Step, "__call__", self._watching),
            (torch.cuda, "synchronize", self._naming),
            (torch.cuda.Stream, "synchronize", self._naming),
            (torch.cuda.Event, "synchronize", self._naming),
            (torch.cuda.Event, "record", self._noting),
        ):
            yield

    def _counting(self, show: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(show)
        def wrapped(message: Any, kind: Any, filename: str, line: int, *rest: Any) -> None:
            if WAIT in str(message):
                self.lines[f"{Path(filename).name}:{line}"] += 1
            show(message, kind, filename, line, *rest)

        return wrapped

    def _watching(self, make_step: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(make_step)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.steps += 1
            warnings.simplefilter("always")
            self._switch(self.steps > 1)
            try:
                return make_step(*args, **kwargs)
            finally:
                self._switch(False)

        return wrapped

    def _naming(self, wait: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(wait)
        def wrapped(*args: Any) -> None:
            was_on = self.is_on
            # An event is done where the host has waited for something later.
            waits = self.lines.total()
            if was_on and getattr(next(iter(args), None), "waits_before", waits) == waits:
                warnings.warn(WAIT, stacklevel=2)
            self._switch(False)
            wait(*args)
            self._switch(was_on)

        return wrapped

    def _noting(self, record: Callable[..., None]) -> Callable[..., None]:
        """Note of an event how many waits were before it."""

        @functools.wraps(record)
        def wrapped(event: Any, *args: Any) -> None:
            event.waits_before = self.lines.total()
            record(event, *args)

        return wrapped

    def _switch(self, is_on: bool) -> None:
        import torch

        if is_on != self.is_on:
            self.is_on = is_on
            torch.cuda.set_sync_debug_mode("warn" if is_on else "default")


def on_ranks(place: Place, count: int, flags: str, folder: Path, notes: Notes) -> list[Step]:
    """The same run in `count` processes of this machine, one a GPU; notes one that dies."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork" if place.on_cpu else "spawn")
    ranks = [
        context.Process(target=_rank, args=(rank, count, port, flags, folder), name=f"rank {rank}")
        for rank in range(count)
    ]
    for process in ranks:
        process.start()
    running = {process.sentinel: process for process in ranks}
    while running:
        for sentinel in wait(list(running)):
            ended = running.pop(sentinel)  # type: ignore[call-overload]
            ended.join()
            if ended.exitcode:
                notes.failed(f"{ended.name} ended with exit code {ended.exitcode}")
                for process in running.values():
                    process.kill()
    return [] if any(process.exitcode for process in ranks) else steps(folder)


def _rank(rank: int, count: int, port: int, flags: str, folder: Path) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    train(flags, folder)
