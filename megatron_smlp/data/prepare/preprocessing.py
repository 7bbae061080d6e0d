"""Text to `.bin`/`.idx`: the run behind `tools/preprocess_data.py`, read from top to bottom."""

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_smlp.command_line import flag_of, note_ignored, require_positive
from megatron_smlp.data.pairs.indexed import optimal_dtype, refuse_existing
from megatron_smlp.data.pairs.manifest import (
    Manifest,
    TokenizerRecord,
    is_manifest,
    is_whole,
    read_manifest,
)
from megatron_smlp.data.prepare.chunks import Position
from megatron_smlp.data.prepare.encoding import EncodingSettings
from megatron_smlp.data.prepare.inputs import describe_inputs, find_inputs, shown, stamps_of
from megatron_smlp.data.prepare.output import Counts, PartialOutput
from megatron_smlp.data.prepare.records import remedy
from megatron_smlp.data.prepare.sentences import SentenceSettings, Splitter
from megatron_smlp.data.prepare.sources import read_chunks
from megatron_smlp.data.prepare.workers import InlineWorker, WorkerPool
from megatron_smlp.data.tokenizers.factory import read_tokenizer
from megatron_smlp.data.tokenizers.spec import READ_BY, Tokenizer, TokenizerSpec
from megatron_smlp.errors import DataError, UsageError

SHARD_BYTES = 64 << 20
"""Uncompressed input between two commits."""
SHARD_SECONDS = 20.0


@dataclass(frozen=True, kw_only=True)
class PreprocessSettings:
    """Everything that `tools/preprocess_data.py` was told."""

    inputs: tuple[str, ...]
    """Files, folders and globs, in the order of the output."""
    output_prefix: str
    tokenizer: TokenizerSpec
    keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    sentences: SentenceSettings | None = None
    """How documents are split into sentences; None if each document is one sequence."""
    workers: int = 1
    """Processes that encode; 1 encodes in the calling process."""
    skip_errors: bool = False
    resume: bool = False
    overwrite: bool = True
    """Whether `resume` may replace a dataset that was made of other input or by other flags."""

    @property
    def level(self) -> str:
        return "sentence" if self.sentences else "document"

    @property
    def pairs(self) -> dict[str, str]:
        """Return the prefix of each key's pair."""
        return {key: f"{self.output_prefix}_{key}_{self.level}" for key in self.keys}


@dataclass(frozen=True)
class Summary:
    """The outcome of a run."""

    prefix: str
    counts: Counts
    seconds: float
    """Time from the first chunk to the published files, without start-up."""
    text_bytes: int
    """Uncompressed input that this run read: less than `counts` say after a resume."""
    encoder: str
    """The library that made the ids, and why a slower one was taken."""
    already_complete: bool = False


def preprocess(
    settings: PreprocessSettings, *, on_progress: Callable[[Counts], None] = lambda counts: None
) -> Summary:
    """Write the dataset that `settings` describe.

    Args:
        on_progress: called after each chunk with the counts so far.

    Raises:
        UsageError: a wrong value.
        DataError: bad input, a refused record unless `skip_errors`, or a worker that died.
            Finished shards stay for `resume`.
    """
    files = find_inputs(settings.inputs)
    tokenizer = read_tokenizer(settings.tokenizer)
    _check(settings, tokenizer)
    stamps = stamps_of(files)
    encoding = EncodingSettings(tokenizer, settings.keys, settings.append_eod, settings.sentences)
    # What decides the bytes of the output; of the tokenizer its rules, and not its ids alone.
    digest = hashlib.sha256(repr((encoding, stamps)).encode()).hexdigest()
    if settings.resume:
        for path, stamp in stamps.items():
            if stamp is None:
                raise DataError(f"--resume: {shown(path)} cannot be read again; give a file")
        if done := _complete_already(settings, digest):
            return done
    partial = PartialOutput(
        settings.output_prefix,
        pairs=settings.pairs,
        level=settings.level,
        dtype=optimal_dtype(tokenizer.vocab_size),
    )
    with partial:
        sources = describe_inputs(files)
        start = partial.start(digest, resume=settings.resume)
        bytes_before = partial.journal.counts.text_bytes
        pool: InlineWorker | WorkerPool = (
            WorkerPool(encoding, settings.workers)
            if settings.workers > 1
            else InlineWorker(encoding)
        )
        with pool as workers:
            began = time.monotonic()
            _encode(workers, start, settings, files, partial, on_progress)
        _publish(settings, tokenizer, sources, digest, partial)
        return Summary(
            settings.output_prefix,
            partial.journal.counts,
            seconds=time.monotonic() - began,
            text_bytes=partial.journal.counts.text_bytes - bytes_before,
            encoder=workers.description,
        )


def _check(settings: PreprocessSettings, tokenizer: Tokenizer) -> None:
    require_positive(settings, "workers")
    if settings.append_eod and tokenizer.eod is None:
        raise UsageError(
            f"--append-eod: this {settings.tokenizer.tokenizer_type} has no end-of-document token; "
            f"set eos_token in its tokenizer_config.json, or leave out --append-eod"
        )
    for key in settings.keys:
        if "/" in key:
            raise UsageError(
                f"--json-keys {key}: a key is part of its files' names, which cannot hold '/'; "
                f"rename it in the input"
            )
    kind = settings.tokenizer.tokenizer_type
    for name, kinds in READ_BY.items():
        if getattr(settings.tokenizer, name) is not None and kind not in kinds:
            note_ignored(flag_of(name), f"a {kind} does not read it")
    if settings.sentences:
        Splitter(settings.sentences)  # or each worker would say that its data is missing


def _complete_already(settings: PreprocessSettings, digest: str) -> Summary | None:
    """Return the summary of a finished dataset of this input and these flags.

    Raises:
        DataError: another one is there, and is not to be replaced.
    """
    if (Path(settings.output_prefix + ".partial") / "journal.json").exists():
        return None
    path = Path(settings.output_prefix + ".json")
    if path.is_file() and is_manifest(path):
        manifest = read_manifest(path)
        counts = dict(manifest.counts)
        is_same = counts.pop("settings", None) == digest
        if is_same and all(is_whole(pair, manifest) for pair in settings.pairs.values()):
            done = Counts(**counts)
            return Summary(settings.output_prefix, done, 0.0, 0, "", already_complete=True)
    if not settings.overwrite:
        why = ", damaged or of other flags, tokenizer files or input, or of an older version"
        refuse_existing(settings.pairs.values(), output_prefix=settings.output_prefix, why=why)
    return None


def _encode(
    workers: WorkerPool | InlineWorker,
    start: Position,
    settings: PreprocessSettings,
    files: list[Path],
    partial: PartialOutput,
    on_progress: Callable[[Counts], None],
) -> None:
    """Encode the input from `start` on into `partial`, with a commit every now and then."""
    counts = partial.journal.counts
    committed_bytes, committed_at = counts.text_bytes, time.monotonic()
    position = start
    chunks = read_chunks(files, keys=settings.keys, start=start)
    for chunk, encoded in workers.encode(chunks):
        if encoded.rejections and not settings.skip_errors:
            first = encoded.rejections[0]
            left = f"nothing was written ({remedy(settings.keys)})"
            if partial.has_journal:
                left = "finished shards are kept, --on-error skip --resume goes on"
            raise DataError(f"{first} [{first.reason}]; {left}")
        partial.write(encoded)
        position = chunk.end
        counts.text_bytes += chunk.num_bytes
        if chunk.damage is None:
            read = partial.journal.text_bytes
            number = str(chunk.end.file)
            read[number] = read.get(number, 0) + chunk.num_bytes
        on_progress(counts)
        due = counts.text_bytes - committed_bytes >= SHARD_BYTES
        if due or time.monotonic() - committed_at >= SHARD_SECONDS:
            partial.commit(position)
            committed_bytes, committed_at = counts.text_bytes, time.monotonic()
    partial.commit(position)


def _publish(
    settings: PreprocessSettings,
    tokenizer: Tokenizer,
    sources: list[dict[str, Any]],
    digest: str,
    partial: PartialOutput,
) -> None:
    counts = partial.journal.counts
    for number, source in enumerate(sources):
        source["text_bytes"] = partial.journal.text_bytes.get(str(number), 0)
    if counts.documents == 0:
        partial.discard()
        reasons = f" ({counts.reasons})" if counts.rejected else ""
        raise DataError(
            f"no document with text in {len(sources)} input file(s): {counts.empty} empty, "
            f"{counts.num_rejected} rejected{reasons}; nothing was written"
        )
    manifest = Manifest(
        tokenizer=TokenizerRecord(
            type=settings.tokenizer.tokenizer_type,
            identity=tokenizer.identity,
            vocab_size=tokenizer.vocab_size,
            eod=tokenizer.eod,
            append_eod=settings.append_eod,
        ),
        pairs=partial.finish(),
        sources=sources,
        counts={**asdict(counts), "settings": digest},
    )
    partial.publish(manifest)


def settings_from_arguments(args: Any) -> PreprocessSettings:
    """Return the settings of the parsed flags of `tools/preprocess_data.py`."""
    sentences = None
    if args.split_sentences:
        sentences = SentenceSettings(args.lang or "english", args.keep_newlines)
    elif args.lang or args.keep_newlines:
        flag = "--lang" if args.lang else "--keep-newlines"
        note_ignored(flag, "it says how --split-sentences splits, which is not given")
    return PreprocessSettings(
        inputs=tuple(args.input),
        output_prefix=os.fspath(args.output_prefix),
        tokenizer=TokenizerSpec.from_arguments(args),
        keys=tuple(dict.fromkeys(args.json_keys)),
        append_eod=args.append_eod,
        sentences=sentences,
        workers=args.workers,
        skip_errors=args.on_error == "skip",
        resume=args.resume,
        overwrite=args.overwrite,
    )
