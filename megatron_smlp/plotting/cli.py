"""The command line of tools/plot_runs.py: read runs and write their figures to files."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_smlp.command_line import Parser
from megatron_smlp.errors import require_package

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from megatron_smlp.plotting.series import Run


FORMATS = ("png", "pdf", "svg")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="plot_runs.py",
        description="Draw losses and expert load of one or more runs, as PNG, PDF and SVG files.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="metrics.jsonl, or its folder"
    )
    parser.add_argument("--labels", nargs="+", metavar="NAME", help="one each (default: folders)")
    parser.add_argument(
        "--output", type=Path, default=Path("plots"), metavar="FOLDER", help="default: plots"
    )
    parser.add_argument(
        "--against",
        nargs="+",
        choices=["steps", "tokens", "flops", "square-flops", "time"],
        help="x axes of the loss, one panel each (default: all)",
    )
    parser.add_argument(
        "--formats",
        nargs="+",
        choices=FORMATS,
        default=list(FORMATS),
        help=f"file formats of each figure (default: {' '.join(FORMATS)})",
    )
    parser.add_argument(
        "--smooth",
        type=int,
        metavar="LINES",
        help="logged lines to average a training curve over, with the raw curve thin behind "
        "it; 1: none (default: a fiftieth of each run's lines)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool.

    Raises:
        UsageError: matplotlib is missing, a run cannot be read, or --output cannot be created.
    """
    args = build_parser().parse_args(argv)
    require_package("matplotlib", purpose="a plot", extra="'megatron-smlp[plots]'")
    from megatron_smlp.plotting.series import read_runs

    runs = read_runs(args.runs, labels=args.labels)
    args.output.mkdir(parents=True, exist_ok=True)
    for name, figure in figures(runs, against=args.against, window=args.smooth):
        for kind in args.formats:
            path = args.output / f"{name}.{kind}"
            figure.savefig(path)
            print(path, flush=True)
    return 0


def figures(
    runs: Sequence[Run], *, against: Sequence[str] | None, window: int | None
) -> Iterator[tuple[str, Figure]]:
    from megatron_smlp.plotting.figures import load_figure, loss_figure, router_figure
    from megatron_smlp.plotting.series import AXES, has_losses

    axes = list(against or AXES)
    yield "loss", loss_figure(runs, axes=axes, window=window)
    if any(has_losses(run, suffix=True)[0] for run in runs):
        yield "loss-suffix", loss_figure(runs, axes=axes, window=window, suffix=True)
    curves = router_figure(runs)
    if curves is not None:
        yield "routers", curves
    for run in runs:
        for evaluation in (False, True):
            load = load_figure(run, evaluation=evaluation)
            if load is not None:
                label = re.sub(r"[^\w.-]+", "_", run.label)
                yield f"load-{label}{'-validation' * evaluation}", load
