"""A run's console output: a start that fits a screen, then lines, above a bar on a terminal.

Only rank 0 prints. Megatron's own output goes to a log (training/captured_output.py).
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_smlp import __version__
from megatron_smlp.accounting.costs import ModelShape
from megatron_smlp.data.blending import SPLIT_FLAGS, SPLITS
from megatron_smlp.platform import cpu
from megatron_smlp.provenance import software, version_of
from megatron_smlp.training.captured_output import terminal
from megatron_smlp.training.parts import configuration
from megatron_smlp.training.start_screen import print_dry_run, summary
from megatron_smlp.unwritable_log import TolerantStream


class RunConsole:
    """Console of a run; silent on all ranks but the first."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.first_rank = args.rank == 0
        stream = cast("TextIO", TolerantStream(terminal(), "standard output"))
        self.console = Console(file=stream, highlight=False, soft_wrap=True)
        self.bar: Progress | None = None

    @contextlib.contextmanager
    def progress(self) -> Iterator[None]:
        """Show a progress bar if standard output is a terminal."""
        if not (self.first_rank and self.console.is_terminal):
            yield
            return
        bar = Progress(
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=self.console,
            redirect_stdout=False,  # Megatron's output goes to its log, not here
            redirect_stderr=False,
        )
        bar.add_task("train", total=self.args.train_iters or 1, note="starting")
        with bar as self.bar:
            yield

    def advance(self, iteration: int, *, note: str) -> None:
        """Advance the bar, if there is one."""
        if self.bar is not None:
            # With --train-samples, Megatron knows the number of iterations only by now.
            total = self.args.train_iters
            self.bar.update(self.bar.task_ids[0], completed=iteration, total=total, note=note)

    def say(self, text: str) -> None:
        """Print one line."""
        if self.first_rank:
            self.console.print(text, markup=False)

    def introduce(self) -> None:
        """Print the start screen: the model, its data, the checkpoint, where the logs are."""
        if not self.first_rank:
            return  # git need not look at a shared folder from every rank
        args = self.args
        commit = software()["commit"]
        ours = f"{__version__} ({commit})" if commit else __version__
        self.say(f"megatron_smlp {ours} on Megatron-Core {version_of('megatron-core')}")
        for line in summary(args, ModelShape.from_args(args)):
            self.say(line)
        if cpu.needed():
            self.say("platform    CPU: GPU-only defaults are off (docs/architecture.md)")
        self.say(f"data        {'mock' if args.mock_data else data_text(args)}")
        self.say(f"start       {'from ' + args.load if args.load else 'from scratch'}")
        if args.log_dir:
            self.say(f"logs        {args.log_dir}: metrics.jsonl, megatron.log")
        else:
            self.say("logs        none: give --log-dir or --save")


def dry_run(args: argparse.Namespace) -> None:
    """Print what the run would be, on rank 0 only; Megatron may reject its configuration."""
    configuration(args)
    if args.rank == 0:
        console = Console(file=terminal(), highlight=False, soft_wrap=True)
        with console.capture() as page:
            print_dry_run(args, console)
        with contextlib.suppress(BrokenPipeError):  # e.g. piped into `head`
            print(page.get(), end="", file=terminal(), flush=True)


def data_text(args: argparse.Namespace) -> str:
    """Return the data flags as given; flags of a single split are preceded by its name."""
    if args.data_path:
        return " ".join(map(str, args.data_path))
    given = {split: getattr(args, flag) for split, flag in zip(SPLITS, SPLIT_FLAGS, strict=True)}
    parts = [" ".join([split, *map(str, paths)]) for split, paths in given.items() if paths]
    return " | ".join(parts) or str(args.data_args_path or args.per_split_data_args_path)
