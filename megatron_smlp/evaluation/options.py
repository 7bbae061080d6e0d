"""The command line of tools/evaluate.py: flags, and what must hold between them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_smlp.command_line import Parser, flag_of
from megatron_smlp.errors import UsageError
from megatron_smlp.generation.cli import check_model_arguments

EPILOG = """\
Other flags are Megatron's and go with --checkpoint: the layout to evaluate in, for example
--tensor-model-parallel-size 2 under torchrun."""


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="evaluate.py",
        description="Zero-shot tasks, or perplexity, of a checkpoint or an exported model.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    model = parser.add_argument_group("model (one of them)")
    model.add_argument("--checkpoint", metavar="DIR", help="the --save folder of a run")
    model.add_argument("--hf", metavar="DIR", help="what tools/convert_checkpoint.py --to hf wrote")
    tasks = parser.add_argument_group("tasks")
    tasks.add_argument("--tasks", metavar="A,B", help="copa,piqa,... or any of the harness")
    tasks.add_argument("--data-dir", metavar="DIR", help="local files of the tasks; no network")
    tasks.add_argument(
        "--prompt-style",
        choices=["lm_eval", "paper"],
        default="lm_eval",
        help="how COPA asks (default lm_eval)",
    )
    tasks.add_argument("--limit", type=int, metavar="N", help="only the first N examples of each")
    tasks.add_argument("--samples", metavar="FILE", help="JSON lines: each example's scores")
    tasks.add_argument("--markdown", metavar="FILE", help="a report beside the paper's figures")
    text = parser.add_argument_group("perplexity")
    text.add_argument("--data-path", metavar="PREFIX", help="a .bin/.idx pair, read once, whole")
    text.add_argument("--split", metavar="A,B,C", help="of a run: read only what it validates on")
    text.add_argument(
        "--stride", type=int, metavar="N", help="tokens between windows (default: no overlap)"
    )
    text.add_argument(
        "--suffix-from",
        type=float,
        metavar="P",
        help="report what position P of a window, or a fraction of T, and later ones predict too "
        "(default: the prefix of partial prediction, else nothing)",
    )
    both = parser.add_argument_group("both")
    both.add_argument(
        "--seq-length",
        type=int,
        metavar="N",
        help="tokens that --checkpoint gets at once (default: those of its training; more with "
        "--toeplitz models)",
    )
    both.add_argument("--batch-size", type=int, default=8, metavar="B", help="(default 8)")
    both.add_argument(
        "--dtype", choices=["auto", "float32", "bfloat16"], default="auto",
        help="to compute in (default: what the weights are stored in)",
    )  # fmt: skip
    both.add_argument("--device", help="of --hf (default: a GPU where there is one)")
    both.add_argument("--output", metavar="FILE", help="write the results as JSON")
    return parser


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and the flags that are left for Megatron.

    Raises:
        UsageError: flags that do not go together.
    """
    options, rest = build_parser().parse_known_args(list(argv))
    check_model_arguments(options)
    if bool(options.tasks) == bool(options.data_path):
        raise UsageError(
            "say what to measure: --tasks copa,piqa,... or --data-path PREFIX (perplexity)"
        )
    if options.hf and options.data_path:
        raise UsageError("--data-path goes with --checkpoint DIR, the run that --hf came from")
    for flag in ("stride", "split", "suffix_from"):
        if options.tasks and getattr(options, flag) is not None:
            raise UsageError(
                f"{flag_of(flag)} {getattr(options, flag)} goes with --data-path PREFIX"
            )
    if options.hf and rest:
        raise UsageError(f"{rest[0]} is not a flag of evaluate.py --hf; `--help` lists them")
    if options.hf and options.seq_length:
        raise UsageError("--seq-length goes with --checkpoint DIR, the run that --hf came from")
    for flag in ("limit", "batch_size", "stride", "seq_length"):
        value = getattr(options, flag)
        if value is not None and value < 1:
            raise UsageError(f"{flag_of(flag)} {value}: give 1 or more")
    _check_outputs(options)
    return options, rest


def _check_outputs(options: argparse.Namespace) -> None:
    """Found before hours of work, not after them."""
    for flag in ("output", "samples", "markdown"):
        path = getattr(options, flag)
        if path is not None and not Path(path).resolve().parent.is_dir():
            raise UsageError(f"--{flag} {path}: the folder {Path(path).parent} does not exist")
