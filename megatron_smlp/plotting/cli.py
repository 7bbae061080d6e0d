"""The command line of `tools/plot_runs.py`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_smlp.command_line import Parser
from megatron_smlp.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from megatron_smlp.plotting.records import Run


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="plot_runs.py",
        description="Draw losses and expert load of one or more runs as PNG files.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="folder of a metrics.jsonl, or the file"
    )
    parser.add_argument("--labels", nargs="+", metavar="NAME", help="one a run (default: folders)")
    parser.add_argument(
        "--output", type=Path, default=Path("plots"), metavar="FOLDER", help="default: plots"
    )
    parser.add_argument(
        "--against",
        nargs="+",
        choices=["steps", "tokens", "flops", "time"],
        default=["steps", "tokens", "flops", "time"],
        help="what the loss is drawn against, a panel each (default: all four)",
    )
    parser.add_argument(
        "--smooth",
        type=int,
        default=1,
        metavar="LINES",
        help="logged lines that a training curve averages over (default 1: none)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool.

    Raises:
        UsageError: matplotlib is not there, a run cannot be read, or --output not be made.
    """
    args = build_parser().parse_args(argv)
    if find_spec("matplotlib") is None:
        raise UsageError("plots need matplotlib: pip install '.[plots]'")
    if args.smooth < 1:
        raise UsageError(f"--smooth {args.smooth}: 1 or more logged lines are expected.")
    from megatron_smlp.plotting.records import read_runs

    runs = read_runs(args.runs, labels=args.labels)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"--output {args.output}: {error.strerror}: give a folder that can be written to."
        ) from error
    for name, figure in figures(runs, against=args.against, window=args.smooth):
        path = args.output / f"{name}.png"
        figure.savefig(path)
        print(path, flush=True)
    return 0


def figures(
    runs: Sequence[Run], *, against: Sequence[str], window: int
) -> Iterator[tuple[str, Figure]]:
    """Name and figure of all that there is to draw."""
    from megatron_smlp.plotting.figures import load_figure, loss_figure, router_figure
    from megatron_smlp.plotting.series import AXES

    for name in against:
        field = AXES[name].field
        for run in runs:
            if not any(field in record for record in run.training):
                raise UsageError(
                    f"{run.label}: no line has {field!r}: leave {name} out of --against."
                )
    yield "loss", loss_figure(runs, axes=against, window=window)
    curves = router_figure(runs)
    if curves is not None:
        yield "routers", curves
    for run in runs:
        for evaluation in (False, True):
            load = load_figure(run, evaluation=evaluation)
            if load is not None:
                yield f"load-{_file_name(run.label)}{'-validation' * evaluation}", load


def _file_name(label: str) -> str:
    """A label as a part of a file's name."""
    return re.sub(r"[^\w.-]+", "_", label)
