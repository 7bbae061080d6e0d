"""The command line of `tools/inspect_dataset.py`: show, validate, split, sample, stats."""

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_smlp.command_line import Parser, require_positive
from megatron_smlp.data.tokenizers.spec import add_tokenizer_arguments, named_or_moved
from megatron_smlp.errors import UsageError
from megatron_smlp.signals import interrupt

if TYPE_CHECKING:
    from megatron_smlp.data.pairs.indexed import Index


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description="Inspect, check and split .bin/.idx pairs.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_command(commands, "show", _show, "header, counts, origin")
    check = _add_command(commands, "validate", _validate, "check every byte; exit 0 or 1")
    check.add_argument("--vocab-size", type=int, metavar="ENTRIES", help="ids must be below it")
    _add_split(commands)
    _add_sample(commands)
    stats = _add_command(commands, "stats", _stats, "document lengths")
    stats.add_argument("--png", metavar="FILE", help="draw the histogram")
    stats.add_argument("--seq-length", type=int, metavar="TOKENS", help="count samples of it")
    return parser


def _add_command(
    commands: "argparse._SubParsersAction[Parser]",
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
    command.set_defaults(run=run)
    command.add_argument("prefix", metavar="PREFIX", help="path of the pair without .bin/.idx")
    return command


def _add_split(commands: "argparse._SubParsersAction[Parser]") -> None:
    split = _add_command(commands, "split", _split, "split documents into train, valid, test")
    split.add_argument("--output-prefix", metavar="PREFIX", help="default: the pair's own prefix")
    split.add_argument(
        "--weights",
        nargs="+",
        type=float,
        default=[0.969, 0.03, 0.001],
        metavar="SHARE",
        help="shares of train, valid, test (default 0.969 0.03 0.001)",
    )
    split.add_argument("--by", choices=["documents", "tokens"], default="tokens")
    split.add_argument(
        "--seed", type=int, help="assign documents at random (default: in their order)"
    )
    split.add_argument("--overwrite", action="store_true", help="replace existing pairs")


def _add_sample(commands: "argparse._SubParsersAction[Parser]") -> None:
    sample = _add_command(
        commands, "sample", _sample, "documents as ids, or text (tokenizer flags)"
    )
    sample.add_argument("--documents", nargs="+", type=int, metavar="N", help="from 0")
    sample.add_argument("--count", type=int, default=3, help="random documents (default 3)")
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--max-tokens", type=int, default=100, help="of each (default 100)")
    add_tokenizer_arguments(sample, required=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; `run_tool` shows the errors."""
    args = build_parser().parse_args(argv)
    return args.run(args)


def _open(args: argparse.Namespace) -> "Index":
    """Open the pair, and check all entries of its index."""
    from megatron_smlp.data.pairs.full_check import require_sound_index
    from megatron_smlp.data.pairs.indexed import open_index, strip_suffix

    index = open_index(strip_suffix(args.prefix))
    require_sound_index(index)
    return index


def _show(args: argparse.Namespace) -> int:
    from megatron_smlp.data.pairs.indexed import bin_path, idx_path

    index = _open(args)
    sizes = [path(index.prefix).stat().st_size for path in (bin_path, idx_path)]
    rows = {
        "token ids": f"{index.num_tokens:,} of {index.dtype}",
        "documents": f"{index.num_documents:,}",
        "sequences": f"{index.num_sequences:,}",
        "bytes": f"{sizes[0]:,} (.bin), {sizes[1]:,} (.idx)",
    }
    rows |= _origin(index.prefix)
    for name, value in rows.items():
        print(f"{name:<16} {value}")
    return 0


def _origin(prefix: str) -> dict[str, str]:
    """Return the contents of the manifest as rows to show."""
    from megatron_smlp.data.pairs.manifest import find_manifest

    origin = find_manifest(prefix)
    if origin is None:
        return {"manifest": "none"}
    path, manifest, pair = origin
    written = manifest.tokenizer
    return {
        "manifest": str(path),
        "tokenizer": f"{written.type}, {written.vocab_size:,} entries, eod {written.eod}",
        "vocabulary": str(written.identity),
        "end of document": "appended" if written.append_eod else "not appended",
        "key, level": f"{pair.key}, {pair.level}",
        "sources": ", ".join(str(next(iter(row.values()))) for row in manifest.sources),
    }


def _validate(args: argparse.Namespace) -> int:
    from megatron_smlp.data.pairs.full_check import validate

    failed = 0
    for rule, problem in validate(args.prefix, vocab_size=args.vocab_size):
        print(f"{'FAILED' if problem else 'ok':<7} {rule}", flush=True)
        if problem:
            print(f"        {problem}")
            failed += 1
    return 1 if failed else 0


def _split(args: argparse.Namespace) -> int:
    from megatron_smlp.data.pairs.indexed import open_index, refuse_existing, strip_suffix
    from megatron_smlp.data.pairs.splitting import NAMES, split

    signal.signal(signal.SIGTERM, interrupt)  # removes unfinished output, as Ctrl-C does
    prefix = strip_suffix(args.prefix)
    output = args.output_prefix or prefix
    if not args.overwrite:
        named = [
            f"{output}_{name}" for name, share in zip(NAMES, args.weights, strict=False) if share
        ]
        refuse_existing(named, output_prefix=output)
    parts = split(prefix, output_prefix=output, weights=args.weights, by=args.by, seed=args.seed)
    for name, documents in parts.items():
        if documents:
            tokens = open_index(f"{output}_{name}").num_tokens
            print(f"{output}_{name}: {documents:,} documents, {tokens:,} tokens")
    return 0


def _sample(args: argparse.Namespace) -> int:
    import random

    index = _open(args)
    require_positive(args, "count", "max_tokens")
    encoder = None
    if spec := named_or_moved(args):
        from megatron_smlp.data.pairs.manifest import find_manifest
        from megatron_smlp.data.tokenizers.factory import read_tokenizer

        tokenizer = read_tokenizer(spec)
        encoder = tokenizer.build()
        origin = find_manifest(index.prefix)
        if origin and tokenizer.identity != origin.manifest.tokenizer.identity:
            wrote = origin.manifest.tokenizer
            print(f"warning: another tokenizer wrote these ids ({wrote})", file=sys.stderr)
    count = min(args.count, index.num_documents)
    chosen = args.documents
    if chosen is None:
        chosen = sorted(random.Random(args.seed).sample(range(index.num_documents), count))
    for number in chosen:
        if not 0 <= number < index.num_documents:
            raise UsageError(f"--documents {number}: there are 0 to {index.num_documents - 1}")
        ids = index.document(number)
        shown = ids[: args.max_tokens].tolist()
        body = encoder.decode(shown) if encoder else " ".join(map(str, shown))
        more = f" (first {len(shown):,})" if len(shown) < len(ids) else ""
        print(f"--- document {number:,}: {len(ids):,} tokens{more}\n{body}")
    return 0


def _stats(args: argparse.Namespace) -> int:
    from megatron_smlp.data.pairs.statistics import (
        document_lengths,
        save_histogram,
        statistics_lines,
    )

    require_positive(args, "seq_length")
    lengths = document_lengths(_open(args))
    print("\n".join(statistics_lines(lengths)))
    if args.seq_length is not None:
        # Megatron's samples are T + 1 tokens that overlap by one.
        samples = max(int(lengths.sum()) - 1, 0) // args.seq_length
        print(f"{samples:,} samples of {args.seq_length:,} tokens an epoch")
    if args.png:
        save_histogram(lengths, Path(args.png), title=Path(args.prefix).name)
        print(f"histogram: {args.png}")
    return 0
