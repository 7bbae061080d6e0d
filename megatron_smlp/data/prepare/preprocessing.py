"""Turn text into `.bin`/`.idx`: the run behind `tools/preprocess_data.py`, from top to bottom."""

import argparse
import hashlib
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_smlp.command_line import require_positive
from megatron_smlp.data.pairs.indexed import optimal_dtype, refuse_existing
from megatron_smlp.data.pairs.manifest import (
    Manifest,
    TokenizerRecord,
    is_manifest,
    is_unchanged,
    read_manifest,
)
from megatron_smlp.data.prepare.encoding import EncodingSettings
from megatron_smlp.data.prepare.inputs import describe_inputs, find_inputs, stamps_of
from megatron_smlp.data.prepare.output import Counts, PartialOutput
from megatron_smlp.data.prepare.records import remedy
from megatron_smlp.data.prepare.sentences import SentenceSettings
from megatron_smlp.data.prepare.sources import read_chunks
from megatron_smlp.data.prepare.workers import InlineWorker, WorkerPool
from megatron_smlp.data.tokenizers.factory import read_tokenizer
from megatron_smlp.data.tokenizers.spec import Tokenizer, TokenizerSpec
from megatron_smlp.errors import DataError, UsageError

SHARD_BYTES = 64 << 20
"""Uncompressed input between two commits."""
SHARD_SECONDS = 20.0


@dataclass(frozen=True)
class Summary:
    """The outcome of a run."""

    prefix: str
    counts: Counts
    seconds: float
    """Time from the first chunk to the published files, without start-up."""
    text_bytes: int
    """Bytes of uncompressed input that this run read: fewer than in `counts` after a resume."""
    encoder: str
    """The library that made the ids, and why a slower one was chosen."""
    already_complete: bool = False


def preprocess(
    args: argparse.Namespace, *, on_progress: Callable[[Counts], None] = lambda counts: None
) -> Summary:
    """Write the dataset that the flags of `tools/preprocess_data.py` describe.

    Args:
        on_progress: called after each chunk with the counts so far.

    Raises:
        UsageError: an invalid value.
        DataError: bad input, a rejected record without --on-error skip, or a worker that died.
            Finished shards are kept for --resume.
    """
    files = find_inputs(args.input)
    spec = TokenizerSpec.from_arguments(args)
    tokenizer = read_tokenizer(spec)
    _check(args, spec, tokenizer)
    stamps = stamps_of(files)
    pairs = pairs_of(args)
    sentences = SentenceSettings(args.lang, args.keep_newlines) if args.split_sentences else None
    encoding = EncodingSettings(tokenizer, tuple(pairs), args.append_eod, sentences)
    # Everything that determines the output, including the tokenizer's rules, not just its ids.
    digest = hashlib.sha256(repr((encoding, stamps)).encode()).hexdigest()
    if args.resume:
        if None in stamps.values():
            raise DataError("--resume: a pipe cannot be read again; give a file")
        if done := _complete_already(args, digest):
            return done
    partial = PartialOutput(
        args.output_prefix,
        pairs=pairs,
        level=_level(args),
        dtype=optimal_dtype(tokenizer.vocab_size),
    )
    with partial:
        sources = describe_inputs(files)
        partial.start(digest, resume=args.resume)
        bytes_before = partial.journal.counts.text_bytes
        pool: AbstractContextManager[WorkerPool | InlineWorker] = (
            WorkerPool(encoding, args.workers)
            if args.workers > 1
            else nullcontext(InlineWorker(encoding))
        )
        with pool as workers:
            began = time.monotonic()
            _encode(workers, args, files, partial, on_progress)
        record = TokenizerRecord(
            type=spec.tokenizer_type,
            identity=tokenizer.identity,
            vocab_size=tokenizer.vocab_size,
            eod=tokenizer.eod,
            append_eod=args.append_eod,
        )
        _publish(record, sources, digest, partial)
        return Summary(
            args.output_prefix,
            partial.journal.counts,
            seconds=time.monotonic() - began,
            text_bytes=partial.journal.counts.text_bytes - bytes_before,
            encoder=workers.description,
        )


def _level(args: argparse.Namespace) -> str:
    return "sentence" if args.split_sentences else "document"


def pairs_of(args: argparse.Namespace) -> dict[str, str]:
    """Return the prefix of each key's pair."""
    return {key: f"{args.output_prefix}_{key}_{_level(args)}" for key in args.json_keys}


def _check(args: argparse.Namespace, spec: TokenizerSpec, tokenizer: Tokenizer) -> None:
    require_positive(args, "workers")
    if args.append_eod and tokenizer.eod is None:
        raise UsageError(
            f"--append-eod: this {spec.tokenizer_type} has no end-of-document token; "
            f"set eos_token in its tokenizer_config.json: Megatron's training needs one too"
        )


def _complete_already(args: argparse.Namespace, digest: str) -> Summary | None:
    """Return the summary of a finished dataset of this input and these flags; None without one.

    Raises:
        DataError: another dataset exists, and may not be replaced.
    """
    if (Path(args.output_prefix + ".partial") / "journal.json").exists():
        return None
    path = Path(args.output_prefix + ".json")
    if path.is_file() and is_manifest(path):
        manifest = read_manifest(path)
        counts = dict(manifest.counts)
        is_same = counts.pop("settings", None) == digest
        prefixes = pairs_of(args).values()
        pairs = [(prefix, manifest.pairs.get(Path(prefix).name)) for prefix in prefixes]
        if is_same and all(pair and is_unchanged(prefix, pair) for prefix, pair in pairs):
            done = Counts(**counts)
            return Summary(args.output_prefix, done, 0.0, 0, "", already_complete=True)
    if not args.overwrite:
        why = ", damaged or from other flags, tokenizer files or input or an older version"
        refuse_existing(pairs_of(args).values(), output_prefix=args.output_prefix, why=why)
    return None


def _encode(
    workers: WorkerPool | InlineWorker,
    args: argparse.Namespace,
    files: list[Path],
    partial: PartialOutput,
    on_progress: Callable[[Counts], None],
) -> None:
    """Encode the input into `partial`, from its position on, with a commit after each shard."""
    counts = partial.journal.counts
    committed_bytes, committed_at = counts.text_bytes, time.monotonic()
    position = partial.journal.position
    chunks = read_chunks(files, keys=tuple(partial.pairs), start=position)
    for chunk, encoded in workers.encode(chunks):
        if encoded.rejections and args.on_error == "raise":
            first = encoded.rejections[0]
            left = f"nothing was written ({remedy(args.json_keys)})"
            if partial.has_journal:
                left = "finished shards are kept; add --on-error skip --resume"
            raise DataError(f"{first} [{first.reason}]; {left}")
        partial.write(encoded)
        position = chunk.end
        counts.text_bytes += chunk.num_bytes
        on_progress(counts)
        due = counts.text_bytes - committed_bytes >= SHARD_BYTES
        if due or time.monotonic() - committed_at >= SHARD_SECONDS:
            partial.commit(position)
            committed_bytes, committed_at = counts.text_bytes, time.monotonic()
    partial.commit(position)


def _publish(
    tokenizer: TokenizerRecord,
    sources: list[dict[str, Any]],
    digest: str,
    partial: PartialOutput,
) -> None:
    counts = partial.journal.counts
    if counts.documents == 0:
        partial.discard()
        reasons = f" ({counts.reasons})" if counts.rejected else ""
        raise DataError(
            f"no document with text in {len(sources)} input file(s): {counts.empty} empty, "
            f"{counts.num_rejected} rejected{reasons}; nothing was written"
        )
    manifest = Manifest(
        tokenizer=tokenizer,
        pairs=partial.finish(),
        sources=sources,
        counts={**asdict(counts), "settings": digest},
    )
    partial.publish(manifest)
