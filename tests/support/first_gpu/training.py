"""Short trainings inside a case's process, and what is watched in them. No torch until one runs."""

from __future__ import annotations

import multiprocessing
import os
import re
import socket
from collections import Counter
from collections.abc import Callable
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
SYNCHRONISES = re.compile(r"(\S+\.py:\d+): .*called a synchronizing CUDA operation")

type Observe = Callable[[Any], Any]


def words(place: Place, system: str, *, precision: str = "--bf16") -> str:
    """Flags of a system's run; weights are drawn on the CPU, as on every device."""
    run = f"--train-iters {NUM_STEPS} --use-cpu-initialization --distributed-timeout-minutes 2"
    return f"{MODEL} {SYSTEMS[system]} {place.size} {precision} {run}"


def train(flags: str, folder: Path, *, observe: Observe = lambda own: own) -> list[Step]:
    """Train in this process, as pretrain_smlp.py does with these flags; return the logged steps."""
    from megatron_smlp.training.captured_output import CapturedOutput
    from pretrain_smlp import patched_arguments
    from pretrain_smlp import train as pretrain

    argv = [*flags.split(), "--log-dir", str(folder)]
    try:
        with ending_well(), CapturedOutput() as output:
            args = patched_arguments(argv)
            output.open(args.log_dir, rank=args.rank)
            pretrain(args, observe=observe)
    finally:
        forget_run()
    return steps(folder) if args.rank == 0 else []


def interrupted(flags: str, folder: Path) -> list[Step]:
    """The steps of a run that ends after BETWEEN of them, and goes on in a second call."""
    saved = f"{flags} --save {folder / 'checkpoints'}"
    before = train(f"{saved} --exit-interval {BETWEEN}", folder / "before")
    return before + train(saved, folder / "after")


class Watching:
    """An observer around the reporter: from the second step on, host synchronisations are logged.

    The first one allocates and compiles.
    """

    def __init__(self, reporter: Any) -> None:
        self.reporter, self.seen = reporter, 0
        self.args: Any = reporter.args

    def __getattr__(self, name: str) -> Any:
        return getattr(self.reporter, name)

    def stepped(self, *args: Any, **kwargs: Any) -> None:
        import warnings

        import torch

        torch.cuda.set_sync_debug_mode("default")  # what is logged of a step is read on the host
        self.reporter.stepped(*args, **kwargs)
        self.seen += 1
        if self.seen < NUM_STEPS:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")


def synchronisations(folder: Path) -> Counter[str]:
    """Source lines that waited for the device, and how often, from the log of a watched run."""
    log = (folder / "megatron.log").read_text(encoding="utf-8")
    return Counter(Path(place).name for place in SYNCHRONISES.findall(log))


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
