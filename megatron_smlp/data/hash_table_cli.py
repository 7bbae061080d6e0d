"""The command line of `tools/build_hash_table.py`: token counts of a corpus -> a HASH table."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_smlp.command_line import Parser, require_positive


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        description="Count the tokens of a corpus and spread the ids over experts so that each "
        "gets the same number of tokens, for --token-router hash.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--data-path",
        nargs="+",
        required=True,
        metavar="PREFIX",
        help="dataset prefixes, or weight and prefix in turns, as in training",
    )
    parser.add_argument("--num-experts", type=int, required=True, help="experts of the model")
    parser.add_argument(
        "--vocab-size",
        type=int,
        help="ids of the tokenizer, without padding (default: what the manifest says)",
    )
    parser.add_argument(
        "--output", required=True, metavar="FILE", help="JSON file for --hash-table"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tool; `run_tool` shows the errors."""
    args = build_parser().parse_args(argv)
    require_positive(args, "num_experts", "vocab_size")
    # Not before --help.
    import numpy as np

    from megatron_smlp.data.blending import parse_blend
    from megatron_smlp.data.token_counts import token_counts, vocabulary_of
    from megatron_smlp.durable import write_durably
    from megatron_smlp.routers.hash_table import balanced_table, table_as_json

    blend = parse_blend(args.data_path, source="--data-path")
    counts = token_counts(blend, vocab_size=args.vocab_size or vocabulary_of(blend))
    table = balanced_table(counts, num_experts=args.num_experts)
    write_durably(Path(args.output), table_as_json(table, num_experts=args.num_experts))
    print(f"{args.output}: {len(table):,} ids over {args.num_experts} experts")
    even = max(counts.sum(), 1) / args.num_experts
    loads = np.bincount(table, weights=counts, minlength=args.num_experts) / even
    print(f"load of an expert: {loads.min():.4f} to {loads.max():.4f} of an even share")
