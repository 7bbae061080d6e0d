"""The command line of `tools/merge_datasets.py`."""

import argparse
import signal
from collections.abc import Sequence

from megatron_smlp.command_line import Parser
from megatron_smlp.signals import interrupt


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description="Concatenate .bin/.idx pairs into one.", allow_abbrev=False)
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="folders (every pair in them, sorted by name) or prefixes, in output order",
    )
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX")
    parser.add_argument(
        "--allow-tokenizer-mismatch",
        action="store_true",
        help="merge pairs whose manifests name different tokenizers",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing pair")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tool; `run_tool` shows the errors."""
    args = build_parser().parse_args(argv)
    from megatron_smlp.data.pairs.combining import find_pairs, merge
    from megatron_smlp.data.pairs.indexed import open_index, refuse_existing, strip_suffix
    from megatron_smlp.data.pairs.manifest import find_manifest

    signal.signal(signal.SIGTERM, interrupt)  # removes unfinished output, as Ctrl-C does
    output = strip_suffix(args.output_prefix)
    if not args.overwrite:
        refuse_existing([output], output_prefix=args.output_prefix)
    prefixes = find_pairs(args.input, output_prefix=output)
    merge(prefixes, output_prefix=output, allow_mismatch=args.allow_tokenizer_mismatch)
    index = open_index(output)
    print(
        f"{output}: {len(prefixes)} pairs, {index.num_documents:,} documents, "
        f"{index.num_tokens:,} tokens, {index.dtype}"
    )
    if find_manifest(output) is None:
        print("no manifest was written: not every input has one with the same tokenizer")
