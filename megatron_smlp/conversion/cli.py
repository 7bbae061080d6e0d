"""The command line of tools/convert_checkpoint.py."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_smlp.checkpoints.folders import TRACKER
from megatron_smlp.command_line import Parser, flag_of, require_positive
from megatron_smlp.conversion.record import LAYOUT
from megatron_smlp.conversion.target import check_target
from megatron_smlp.errors import UsageError
from megatron_smlp.library_logging import silence_libraries
from megatron_smlp.options import MODEL_FLAGS, argument_of
from megatron_smlp.platform.allocator import return_large_blocks

DESCRIPTION = "Convert a checkpoint to another format or layout: one process, no GPU."
# A flag's destination -> the formats, from and to, that it applies to; None: any.
ONLY = {
    "ckpt_step": ("torch_dist", None),
    "average": ("torch_dist", None),
    "drop_optimizer": ("torch_dist", "torch_dist"),
    **{f"target_{name}": (None, "torch_dist") for name in LAYOUT},
    "tokenizer_model": (None, "hf"),
    "license": (None, "hf"),
    "max_shard_size": (None, "hf"),
}
SHARD_SIZE = "5GB"
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="convert_checkpoint.py",
        description=DESCRIPTION,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--load", "--checkpoint", type=Path, required=True, metavar="DIR",
        help="input: a run's --save folder, an iter_ folder or an exported folder",
    )  # fmt: skip
    parser.add_argument(
        "--save", "--output", type=Path, required=True, metavar="DIR", help="to write"
    )
    parser.add_argument(
        "--from", dest="source", choices=["torch_dist", "hf", "gpt2"], default="torch_dist",
        help="torch_dist: the --save folder of a run; hf: a folder that --to hf wrote, or "
        "one of GPT2LMHeadModel or LlamaForCausalLM; gpt2: only a GPT-2",
    )  # fmt: skip
    parser.add_argument(
        "--to", dest="target", choices=["torch_dist", "hf"], required=True, help="what to write"
    )
    parser.add_argument(
        "--ckpt-step", type=int, metavar="N", help="read this iteration (default: the newest)"
    )
    parser.add_argument(
        "--average", type=int, metavar="N",
        help="torch_dist: average the weights of N checkpoints, that iteration's and earlier "
        "ones; to torch_dist: a release, without optimizer state",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace what is in --save")
    parser.add_argument(
        "--no-check", dest="checks", action="store_false",
        help="skip the comparison of logits at the end",
    )  # fmt: skip
    parser.add_argument(
        "--max-shard-size", metavar="SIZE",
        help=f"hf: maximum weights file size, e.g. 500MB, 5GB (default: {SHARD_SIZE})",
    )  # fmt: skip
    parser.add_argument(
        "--tokenizer-model", metavar="FOLDER",
        help="hf: Hugging Face tokenizer to save with the model (default: the run's)",
    )  # fmt: skip
    parser.add_argument(
        "--license", metavar="NAME",
        help="hf: license for the model card (README.md), by its Hub name, e.g. apache-2.0 "
        "(default: none)",
    )  # fmt: skip
    parser.add_argument(
        "--make-vocab-size-divisible-by", type=int, metavar="N",
        help="pad the vocabulary to a multiple of this times the tensor parallel size (default: "
        "unchanged; gpt2: 128)",
    )  # fmt: skip
    for name in LAYOUT:
        parser.add_argument(
            flag_of(f"target_{name}"), type=int, metavar="N",
            help="torch_dist: parallel size of the target run, checked and recorded (default: "
            "that of the source run)",
        )  # fmt: skip
    parser.add_argument(
        "--drop-optimizer", action="store_true",
        help="torch_dist to torch_dist: write only the weights, as a release",
    )  # fmt: skip
    _add_upcycling(parser)
    return parser


def _add_upcycling(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the sparse model, spelled as pretrain_smlp.py spells them."""
    group = parser.add_argument_group("upcycling", "to torch_dist: turn a dense model sparse")
    group.add_argument(
        "--upcycle", action="store_true",
        help="copy the dense FFNs and spatial matrices into experts, with new routers",
    )  # fmt: skip
    for name, facts in MODEL_FLAGS.items():
        if facts.upcycling:
            group.add_argument(flag_of(name), **argument_of(name))


def _sparse_flags(options: argparse.Namespace) -> dict[str, Any]:
    """Return the upcycling flags that were given.

    Raises:
        UsageError: some were, without --upcycle.
    """
    given = {name: getattr(options, name) for name, facts in MODEL_FLAGS.items() if facts.upcycling}
    given = {name: value for name, value in given.items() if value is not None}
    if given and not options.upcycle:
        flag = flag_of(next(iter(given)))
        raise UsageError(f"{flag} has no effect without --upcycle: give both or neither.")
    return given


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    # Imported late: torch and Megatron take seconds, and --help and wrong flags should not.
    silence_libraries()
    return_large_blocks()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # all runs on the CPU: torch need not initialize a GPU
    from megatron_smlp.conversion import convert

    if options.target == "hf":
        convert.torch_dist_to_hf(options)
    elif options.upcycle:
        convert.upcycle(options)
    elif options.source == "torch_dist":
        convert.torch_dist_to_torch_dist(options)
    else:
        convert.to_torch_dist(options)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of `build_parser`, and what is derived from them.

    `model`: the flags that were given for --upcycle's sparse model; `layout`: the parallel sizes
    that were given; `shard_limit`: maximum bytes of one weights file.

    Raises:
        UsageError: flags do not go together, or something in a folder would be lost.
    """
    options = build_parser().parse_args(argv)
    options.model = _sparse_flags(options)
    if options.target == "hf" and (options.source != "torch_dist" or options.upcycle):
        raise UsageError(
            "--to hf takes --from torch_dist, without --upcycle: convert to torch_dist first."
        )
    _check_used(options)
    sizes = {name: getattr(options, f"target_{name}") for name in LAYOUT}
    options.layout = {name: size for name, size in sizes.items() if size is not None}
    layout = [f"target_{name}" for name in LAYOUT]
    require_positive(options, "average", "make_vocab_size_divisible_by", *layout)
    options.shard_limit = parse_size(options.max_shard_size or SHARD_SIZE)
    _check_load(options.load, options.source)
    check_target(options.save, options.load, overwrite=options.overwrite)
    return options


def _check_used(options: argparse.Namespace) -> None:
    """Raise UsageError for a flag that this conversion does not read."""
    for name, (source, target) in ONLY.items():
        value = getattr(options, name)
        if value is None or value is False:
            continue
        if source not in (None, options.source) or target not in (None, options.target):
            raise UsageError(
                f"{flag_of(name)} has no effect with --from {options.source} --to "
                f"{options.target}: omit it."
            )


def _check_load(load: Path, source: str) -> None:
    """Raise UsageError if a folder is plainly not in the format that --from names."""
    is_run = (load / TRACKER).is_file() or (load / ".metadata").is_file()
    is_huggingface = (load / "config.json").is_file()
    if source == "torch_dist" and is_huggingface and not is_run:
        raise UsageError(f"--load {load} is a Hugging Face folder: give --from hf.")
    if source != "torch_dist" and is_run and not is_huggingface:
        raise UsageError(f"--load {load} is a Megatron checkpoint: give --from torch_dist.")


def parse_size(text: str) -> int:
    """Return the bytes of a size: `5GB` -> 5 * 10**9.

    Raises:
        UsageError: it is not a number of bytes above 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?B?)", text.strip().upper())
    size = int(float(match[1]) * UNITS[match[2]]) if match and match[2] in UNITS else 0
    if size < 1:
        raise UsageError(f"--max-shard-size {text}: give a size like 500MB or 5GB.")
    return size
