"""The command line of `tools/build_hash_table.py`: token counts of a corpus -> a HASH table."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_smlp.data.blending import Blend, parse_blend
from megatron_smlp.data.errors import DataError
from megatron_smlp.data.indexed import in_parts, open_index
from megatron_smlp.data.manifest import find_manifest, write_atomically


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
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
    if args.num_experts < 1:
        raise DataError(f"--num-experts {args.num_experts}: give a positive number")
    blend = parse_blend(args.data_path, source="--data-path")
    counts = token_counts(blend, vocab_size=args.vocab_size or _vocab_size(blend))
    from megatron_smlp.routers.hash_table import balanced_table, table_as_json

    table = balanced_table(counts, num_experts=args.num_experts)
    write_atomically(Path(args.output), table_as_json(table, num_experts=args.num_experts))
    loads = np.bincount(table, weights=counts, minlength=args.num_experts)
    shares = loads / max(loads.sum(), 1) * args.num_experts
    print(
        f"{args.output}: {len(table):,} ids over {args.num_experts} experts, load of an expert "
        f"{shares.min():.4f} to {shares.max():.4f} of an even share"
    )
    if shares.max() > 1.1:
        print(
            f"one id is {counts.max() / counts.sum():.1%} of all tokens: no table spreads it over "
            "several experts"
        )


def _vocab_size(blend: Blend) -> int:
    sizes: dict[int, str] = {}
    for prefix in blend.prefixes:
        found = find_manifest(prefix)
        if found is None:
            raise DataError(
                f"{prefix} has no manifest that tells its vocabulary: give --vocab-size"
            )
        sizes[found[1].tokenizer.vocab_size] = prefix
    if len(sizes) > 1:
        words = ", ".join(f"{prefix} has {size:,} ids" for size, prefix in sizes.items())
        raise DataError(f"--data-path holds data of several vocabularies: {words}")
    return next(iter(sizes))


def token_counts(blend: Blend, *, vocab_size: int) -> NDArray[np.int64]:
    """How often each id is in the corpus; with weights, in as many tokens of that mixture.

    Returns:
        <int64>[V].

    Raises:
        DataError: a dataset is missing or damaged, or holds an id outside the vocabulary.
    """
    parts = [_counts(prefix, vocab_size) for prefix in blend.prefixes]
    if blend.weights is None:
        return np.sum(parts, axis=0, dtype=np.int64)
    total = sum(int(part.sum()) for part in parts)
    weights = np.array(blend.weights) / sum(blend.weights)
    shares = [w * part / max(part.sum(), 1) for w, part in zip(weights, parts, strict=True)]
    return np.rint(total * np.sum(shares, axis=0)).astype(np.int64)


def _counts(prefix: str, vocab_size: int) -> NDArray[np.int64]:
    counts = np.zeros(vocab_size, dtype=np.int64)
    for part in in_parts(open_index(prefix).tokens()):
        found = np.bincount(part, minlength=vocab_size)
        if len(found) > vocab_size:
            raise DataError(
                f"{prefix} holds the id {len(found) - 1}, outside a vocabulary of {vocab_size:,} "
                "ids: give the tokenizer's --vocab-size"
            )
        counts += found
    return counts
