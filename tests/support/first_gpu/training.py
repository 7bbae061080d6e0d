"""Short trainings inside a case's process, and what is watched in them. No torch until one runs.

The gate matters in all of them. A new model's M is nearly zero, and nothing depends on it: here its
entries are as large as 1 / sqrt(T), and above the diagonal they are garbage that must not be read.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from support.first_gpu import sabotage
from support.first_gpu.notes import Notes, Place
from support.launches import Step, steps
from support.ranks import free_port
from support.runs import ending_well, forget_run
from support.systems import MODEL, SYSTEMS

SPARSE = "smlp_deterministic"
"""The system of the cases that need one: gating, chunks and token experts."""
NUM_STEPS = 3
RESUMED_FROM = 1
WAIT = "called a synchronizing CUDA operation"
MOMENTS = "optimizer.state.exp_avg."
"""Prefix of Adam's first moments in a checkpoint. After one step they are a tenth of the full
gradients, whatever the layout."""

no_context = contextlib.nullcontext

type Around = Callable[[], contextlib.AbstractContextManager[object]]
type Gradients = dict[str, Any]
"""Name of a parameter -> <fp32>, of its shape."""


@dataclass(frozen=True)
class Start:
    """Weights that a layout starts from, drawn once: pipeline stages draw other values than one
    process. Flags as in `run_flags`: a system, and what changes for that many ranks.
    """

    system: str
    flags: str = ""


OF_EIGHT = "--num-experts 8 --micro-batch-size 1 --global-batch-size 8"
STARTS = {
    "layouts": Start(SPARSE),
    "eight": Start(SPARSE, OF_EIGHT),
    "uneven": Start("hash", OF_EIGHT),  # HASH balances nothing
}


def run_flags(place: Place, system: str, *, precision: str = "--bf16") -> str:
    """Return flags of a system's run; weights are drawn on the CPU, whatever the device.

    Gradients are not clipped: clipping would hide a factor on all of them.
    """
    run = f"--train-iters {NUM_STEPS} --use-cpu-initialization --distributed-timeout-minutes 2"
    return f"{MODEL} {SYSTEMS[system]} {place.size} {precision} {run} --clip-grad 1e6"


def train(flags: str, folder: Path, *, around: Around = no_context) -> list[Step]:
    """Train in this process, as pretrain_smlp.py does with these flags; return the logged steps.

    around: entered once Megatron is imported and patched.
    """
    from megatron_smlp.training.captured_output import CapturedOutput
    from pretrain_smlp import patched_arguments
    from pretrain_smlp import train as pretrain

    argv = [*flags.split(), "--log-dir", str(folder)]
    try:
        with ending_well(), CapturedOutput() as output:
            args = patched_arguments(argv)
            output.open(args.log_dir, rank=args.rank)
            with gates_that_matter(), sabotage.installed(), around():
                pretrain(args)
    finally:
        forget_run()
    return steps(folder) if args.rank == 0 else []


@contextlib.contextmanager
def gates_that_matter() -> Iterator[None]:
    """Draw M as the module docstring says."""
    from megatron_smlp.layers.spatial_gating import SpatialProjection
    from megatron_smlp.megatron_patches.wrapping import wrapped_in

    def widely(draw: Callable[..., None]) -> Callable[..., None]:
        def wrapped(projection: Any, first_head: int, total_heads: int, bound: float) -> None:
            draw(projection, first_head, total_heads, projection.length**-0.5)

        return wrapped

    with wrapped_in(
        (SpatialProjection, "_draw", widely),
        (SpatialProjection, "_causal", lambda _: lambda projection, matrix: matrix),
    ):
        yield


def saving(flags: str, folder: Path) -> str:
    """Return flags of a run that saves after each step."""
    return f"{flags} --save {folder / 'checkpoints'} --save-interval 1"


def first_gradients(folder: Path) -> Gradients:
    """Return the first step's gradients of a run that was `saving`, times a factor."""
    from megatron_smlp.checkpoints.folders import iteration_folder
    from megatron_smlp.checkpoints.reader import TorchDistReader

    reader = TorchDistReader(iteration_folder(folder / "checkpoints", 1))
    names = [name for name in reader.entries if name.startswith(MOMENTS)]
    return {name.removeprefix(MOMENTS): reader.read(name) for name in names}


def make_seed(place: Place, start: str) -> None:
    """Save weights that layouts start from."""
    flags = f"--train-iters 1 --lr-decay-iters {NUM_STEPS} --no-save-optim --no-save-rng"
    flags = f"{run_flags(place, STARTS[start].system)} {STARTS[start].flags} {flags}"
    train(f"{flags} --save {_seed(place, start)}", place.folder / f"seed_{start}_log")


def from_seed(place: Place, start: str, *, precision: str = "--bf16") -> str:
    """Return flags of a run that starts from those weights."""
    load = f"--load {_seed(place, start)} --finetune --no-load-optim --no-load-rng"
    flags = run_flags(place, STARTS[start].system, precision=precision)
    return f"{flags} {STARTS[start].flags} {load}"


def _seed(place: Place, start: str) -> Path:
    return place.folder / f"seed_{start}"


def resumed(flags: str, folder: Path) -> list[Step]:
    """Resume a run that was `saving` from its first step; return the further steps."""
    load = f"--load {folder / 'checkpoints'} --ckpt-step {RESUMED_FROM}"
    return train(f"{flags} {load}", folder / "resumed")


class Watch:
    """Counts where torch waits for the device within steps, to read or copy, from the second one
    on: the first allocates and compiles. What a log line reads comes after a step.
    """

    def __init__(self) -> None:
        self.lines: Counter[str] = Counter()
        """Source line -> how often it waited."""
        self.steps = 0
        self.peak = 0
        """Peak bytes that torch had allocated within a step; a save is not part of it."""

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        from megatron_smlp.megatron_patches.wrapping import wrapped_in
        from megatron_smlp.training.step import Step

        with wrapped_in((Step, "__call__", self._watching)):
            yield

    def _watching(self, make_step: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(make_step)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            import torch

            self.steps += 1
            torch.cuda.reset_peak_memory_stats()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn" if self.steps > 1 else "default")
                try:
                    return make_step(*args, **kwargs)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
                    self.peak = max(self.peak, torch.cuda.max_memory_allocated())
                    waits = (one for one in caught if WAIT in str(one.message))
                    self.lines.update(f"{Path(one.filename).name}:{one.lineno}" for one in waits)

        return wrapped


def on_ranks(place: Place, count: int, flags: str, folder: Path, notes: Notes) -> list[Step]:
    """Train in `count` processes of this machine, one per GPU; note any that dies."""
    port = free_port()
    context = multiprocessing.get_context("fork" if place.can_fork else "spawn")
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
