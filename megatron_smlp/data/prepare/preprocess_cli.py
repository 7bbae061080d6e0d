"""The command line of `tools/preprocess_data.py`. Imports nothing heavy before `--help`."""

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_smlp.command_line import Parser, note_ignored
from megatron_smlp.data.tokenizers.spec import add_tokenizer_arguments
from megatron_smlp.progress import Progress
from megatron_smlp.signals import interrupt

if TYPE_CHECKING:
    from megatron_smlp.data.prepare.output import Counts
    from megatron_smlp.data.prepare.preprocessing import Summary

# Present and former flags of Megatron's tool that do not affect the ids that are written.
IGNORED_FLAGS = (
    *("--partitions", "--log-interval", "--keep-sequential-samples", "--find-optimal-num-workers"),
    *("--workers-to-check", "--max-documents", "--performance-dir", "--dataset-impl"),
    *("--chunk-size", "--vocab-extra-ids", "--make-vocab-size-divisible-by"),
    *("--padded-vocab-size", "--no-pad-vocab-size", "--disable-pad-vocab-size"),
    *("--tokenizer-metadata", "--chat-template", "--null-tokenizer-pad-id"),
)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all flags; Megatron's keep their names and meaning."""
    parser = Parser(description="Turn text into Megatron's .bin/.idx pairs.", allow_abbrev=False)
    group = parser.add_argument_group("input")
    group.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files, folders or globs: .jsonl .json (.gz .zst .bz2 .xz), .parquet",
    )
    group.add_argument("--json-keys", nargs="+", default=["text"], metavar="KEY")
    group.add_argument(
        "--on-error",
        choices=["raise", "skip"],
        default="raise",
        help="stop at the first bad record with file:line (default), or list and count them",
    )
    group.add_argument("--split-sentences", action="store_true", help="sequence per sentence")
    group.add_argument("--lang", default="english", help="language of --split-sentences")
    group.add_argument("--keep-newlines", action="store_true", help="with --split-sentences")
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output-prefix",
        required=True,
        metavar="PREFIX",
        help="writes PREFIX_KEY_document.bin/.idx and PREFIX.json",
    )
    group.add_argument(
        "--append-eod", action="store_true", help="end each document with the end-of-document id"
    )
    group.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    group.add_argument("--resume", action="store_true", help="resume a killed run")
    group.add_argument(
        "--workers", type=int, default=1, metavar="N", help="encoding processes (default 1)"
    )
    add_tokenizer_arguments(parser)
    for flag in IGNORED_FLAGS:
        parser.add_argument(flag, nargs="*", action=_Ignored, help=argparse.SUPPRESS)
    return parser


class _Ignored(argparse.Action):
    """Accepts a flag of Megatron's tool that does nothing here."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        note_ignored(option, "all input is read, in order, and no id depends on it")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; `run_tool` shows the errors."""
    began = time.monotonic()
    args = build_parser().parse_args(argv)
    # A scheduler's SIGTERM ends the run as Ctrl-C does: workers stop, finished shards stay.
    signal.signal(signal.SIGTERM, interrupt)
    from megatron_smlp.data.pairs.indexed import refuse_existing
    from megatron_smlp.data.prepare.inputs import comparable_size, find_inputs
    from megatron_smlp.data.prepare.preprocessing import pairs_of, preprocess

    if not (args.overwrite or args.resume):
        refuse_existing(pairs_of(args).values(), output_prefix=args.output_prefix)
    files = find_inputs(args.input)
    try:
        with _Report(comparable_size(files)) as report:
            summary = preprocess(args, on_progress=report.update)
    except KeyboardInterrupt:
        rest = "nothing was written"
        if Path(args.output_prefix + ".partial").exists():
            rest = "finished shards are kept, rerun with --resume"
        print(f"interrupted: {rest}", file=sys.stderr)
        return 128 + signal.SIGINT
    _print_summary(summary, time.monotonic() - began)
    return 0


class _Report(Progress):
    """Shows MB/s of input text, documents, tokens and time left."""

    start: tuple[float, int, int] | None = None
    """Time, bytes and documents at the first report: start-up and the work of an earlier run say
    nothing about the speed of this one."""

    def update(self, counts: "Counts") -> None:
        """Show the counts after another chunk."""
        now = time.monotonic()
        self.start = self.start or (now, counts.text_bytes, counts.documents)
        began, bytes_before, documents_before = self.start
        seconds = max(now - began, 1e-9)
        text_rate = (counts.text_bytes - bytes_before) / 1e6 / seconds
        document_rate = (counts.documents - documents_before) / seconds
        rejected = f", {counts.num_rejected:,} rejected" if counts.num_rejected else ""
        self.show(
            counts.text_bytes,
            f"{counts.text_bytes / 1e6:,.0f} MB, {text_rate:.1f} MB/s, "
            f"{counts.documents:,} documents ({document_rate:,.0f}/s), "
            f"{counts.tokens:,} tokens{rejected}",
        )


def _print_summary(summary: "Summary", total_seconds: float) -> None:
    counts = summary.counts
    made = f"{counts.documents:,} documents, {counts.tokens:,} tokens"
    read = f"{counts.text_bytes / 1e6:,.1f} MB of text"
    if summary.already_complete:
        print(f"{summary.prefix}: already complete ({made} from {read})")
    else:
        if kept := counts.text_bytes - summary.text_bytes:
            read += f" ({kept / 1e6:,.1f} of them kept by --resume)"
        rate = f"{summary.text_bytes / 1e6 / max(summary.seconds, 1e-9):.1f} MB/s"
        start_up = f"start-up {total_seconds - summary.seconds:.1f} s"
        print(f"{summary.prefix}: {made} from {read} by {summary.encoder}, {rate}, {start_up}")
    if counts.empty:
        print(f"skipped {counts.empty:,} empty documents")
    if counts.rejected:
        listed = f"{summary.prefix}.rejected.jsonl"
        print(f"rejected {counts.num_rejected:,} records ({counts.reasons}), listed in {listed}")
