"""The writers of TensorBoard and W&B, which Megatron opens on the last rank.

A full disk costs the run its curves, not its life: TensorBoard's writer raises an error of its
background thread in the next call that logs.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer

from megatron_smlp.unwritable_log import UnwritableLog


class TolerantWriter:
    """Wraps a writer so that its methods raise no OSError."""

    def __init__(self, writer: Any, folder: str) -> None:
        self.writer = writer
        self.lost = UnwritableLog(Path(folder))

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.writer, name)
        return self.lost.tolerated()(value) if callable(value) else value


class Writers:
    """Both writers; every rank may call, but only the rank that has them writes."""

    def __init__(self, args: argparse.Namespace) -> None:
        writer = get_tensorboard_writer()
        self.tensorboard = writer and TolerantWriter(writer, args.tensorboard_dir)
        self.wandb = get_wandb_writer()

    def __bool__(self) -> bool:
        return self.tensorboard is not None or self.wandb is not None

    def add(self, name: str, value: Any, iteration: int, *, samples: int | None = None) -> None:
        """Add a number at `iteration` and, if given, at `samples`, the samples so far."""
        if self.tensorboard:
            self.tensorboard.add_scalar(name, value, iteration)
            if samples is not None:
                self.tensorboard.add_scalar(f"{name} vs samples", value, samples)
        if self.wandb:
            self.wandb.log({name: value}, iteration)

    def add_all(self, values: Mapping[str, float], iteration: int) -> None:
        for name, value in values.items():
            self.add(name, value, iteration)

    def write_flags(self, args: argparse.Namespace) -> None:
        """Write the run's arguments to TensorBoard as text."""
        if self.tensorboard:
            for name, value in vars(args).items():
                self.tensorboard.add_text(name, str(value), global_step=args.iteration)

    def forget_after(self, iteration: int) -> None:
        """Tell TensorBoard that the run resumes at `iteration`, so that it drops later points."""
        if self.tensorboard is None:
            return
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        start = SessionLog(status=SessionLog.START)
        # What torch's writer does for `purge_step`, which Megatron does not know yet at creation.
        self.tensorboard.file_writer.add_event(Event(step=iteration + 1, session_log=start))

    def close(self) -> None:
        if self.tensorboard:
            self.tensorboard.flush()
        if self.wandb:
            self.wandb.finish()


def run_curves(numbers: Mapping[str, Any]) -> dict[str, float]:
    """Return the values of a line of metrics.jsonl that Megatron's own curves lack."""
    names = ("tokens_per_second", "tflops_per_device", "mfu", "consumed_tokens")
    return {f"run/{name}": numbers[name] for name in names if numbers[name] is not None}
