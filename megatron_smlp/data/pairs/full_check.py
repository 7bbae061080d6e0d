"""Every rule that a pair must keep, checked over all of its bytes, in parts."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_smlp.data.pairs.indexed import (
    COPY_ITEMS,
    Index,
    bin_path,
    idx_path,
    in_parts,
    open_index,
    strip_suffix,
)
from megatron_smlp.data.pairs.manifest import Manifest, find_manifest, sha256_of
from megatron_smlp.errors import DataError


@dataclass(frozen=True)
class Finding:
    """The outcome of one rule."""

    rule: str
    problem: str | None
    """What is wrong; None if the rule holds."""


def validate(prefix: str, *, vocab_size: int | None = None) -> Iterator[Finding]:
    """Check every rule; one after another, as they are done.

    Args:
        vocab_size: entries of the vocabulary; None takes it from the manifest.
    """
    prefix = strip_suffix(prefix)
    try:
        index = open_index(prefix)
        found = find_manifest(prefix)
    except DataError as error:
        yield Finding("files, header and sizes", str(error))
        return
    yield Finding("files, header and sizes", None)
    yield from check_index(index)
    manifest = found[1] if found else None
    size = vocab_size or (manifest.tokenizer.vocab_size if manifest else None)
    yield _finding("token ids", lambda: check_ids(index, size))
    if manifest is None:
        yield Finding("manifest (none: counts and checksums are not known)", None)
        return
    yield _finding("counts of the manifest", lambda: _check_counts(index, manifest))
    yield _finding("end-of-document ids", lambda: _check_eod(index, manifest))
    yield _finding("checksums of the manifest", lambda: check_checksums(index, manifest))


def _finding(rule: str, check: Callable[[], None]) -> Finding:
    try:
        check()
    except DataError as error:
        return Finding(rule, str(error))
    return Finding(rule, None)


def check_index(index: Index) -> Iterator[Finding]:
    """Check the rules of `.idx` alone, over all of its entries."""
    yield _finding("sequence lengths", lambda: check_lengths(index))
    yield _finding("byte pointers", lambda: check_pointers(index))
    yield _finding("document starts", lambda: check_documents(index))


def require_sound_index(index: Index) -> None:
    """Raise `DataError` at the first rule that `.idx` breaks."""
    for finding in check_index(index):
        if finding.problem:
            raise index.damage(finding.problem)


def check_lengths(index: Index) -> None:
    """Raise `DataError` at the first negative length."""
    for at, part in _numbered(index.lengths):
        bad = np.flatnonzero(part < 0)
        if len(bad):
            where = at + int(bad[0])
            raise DataError(f"sequence {where} has length {index.lengths[where]}")


def check_pointers(index: Index) -> None:
    """Raise `DataError` at the first pointer that is not the end of the sequence before it."""
    expected = 0
    for at, lengths in _numbered(index.lengths):
        sizes = lengths.astype(np.int64) * index.dtype.itemsize
        wanted = expected + np.cumsum(sizes) - sizes
        bad = np.flatnonzero(index.pointers[at : at + len(lengths)] != wanted)
        if len(bad):
            where = at + int(bad[0])
            raise DataError(
                f"sequence {where} points at byte {index.pointers[where]}, but the sequence before "
                f"it ends at byte {wanted[bad[0]]}"
            )
        expected += int(sizes.sum())


def check_documents(index: Index) -> None:
    """Raise `DataError` where document starts go backwards."""
    previous = 0
    for at, starts in _numbered(index.documents):
        steps = np.diff(starts, prepend=previous)
        bad = np.flatnonzero(steps < 0)
        if len(bad):
            where = at + int(bad[0])
            raise DataError(
                f"document {where} starts at sequence {index.documents[where]}, before the one "
                f"ahead of it"
            )
        previous = int(starts[-1])


def check_ids(index: Index, vocab_size: int | None, *, blocks: Sequence[slice] = ()) -> None:
    """Raise `DataError` at the first id outside of 0 to `vocab_size` - 1.

    Args:
        blocks: the tokens to look at; none: all.
    """
    limit = np.iinfo(index.dtype).max + 1 if vocab_size is None else vocab_size
    tokens = index.tokens
    chosen = ((block.start, tokens[block]) for block in blocks)
    for at, ids in chosen if blocks else _numbered(tokens):
        if int(ids.min()) < 0 or int(ids.max()) >= limit:
            where = at + int(np.flatnonzero((ids < 0) | (ids >= limit))[0])
            sequence = int(np.searchsorted(index.pointers, where * index.dtype.itemsize, "right"))
            raise DataError(
                f"token {where} (sequence {sequence - 1}) has id {tokens[where]}, outside "
                f"of 0 to {limit - 1}"
            )


def _check_counts(index: Index, manifest: Manifest) -> None:
    pair = manifest.pairs[Path(index.prefix).name]
    actual = {
        "dtype": index.dtype.name,
        "documents": index.num_documents,
        "sequences": index.num_sequences,
        "tokens": index.expected_bin_bytes // index.dtype.itemsize,
        "idx_bytes": idx_path(index.prefix).stat().st_size,
    }
    for name, value in actual.items():
        if getattr(pair, name) != value:
            raise DataError(f"{name} is {value}, but the manifest says {getattr(pair, name)}")
    pairs = manifest.pairs.values()
    for name, value in (
        ("documents", pair.documents),
        ("tokens", sum(each.tokens for each in pairs)),
    ):
        if manifest.counts.get(name, value) != value:
            raise DataError(
                f"the pairs hold {value} {name}, but their run counted {manifest.counts[name]}: "
                "preprocess again"
            )


def _check_eod(index: Index, manifest: Manifest) -> None:
    """Raise `DataError` where a document does not end in EOD, and the manifest says it does."""
    if not manifest.tokenizer.append_eod or index.num_sequences == 0:
        return
    tokens = index.tokens
    for at, starts in _numbered(index.documents[1:]):
        before = np.concatenate(([index.documents[at]], starts[:-1]))
        last = starts[starts > before] - 1
        ends = index.pointers[last] // index.dtype.itemsize + index.lengths[last] - 1
        if len(ends) and ends.max() < len(tokens) and ends.min() >= 0:
            wrong = np.flatnonzero(tokens[ends] != manifest.tokenizer.eod)
            if len(wrong):
                raise DataError(
                    f"the document that ends with sequence {last[wrong[0]]} ends in id "
                    f"{tokens[ends[wrong[0]]]}, not in end-of-document {manifest.tokenizer.eod}"
                )


def check_checksums(index: Index, manifest: Manifest) -> None:
    """Raise `DataError` where SHA-256 of a file is not that of the manifest."""
    pair = manifest.pairs[Path(index.prefix).name]
    for path, expected in (
        (idx_path(index.prefix), pair.idx_sha256),
        (bin_path(index.prefix), pair.bin_sha256),
    ):
        if sha256_of(path) != expected:
            raise DataError(f"SHA-256 of {path} is not that of the manifest: its bytes changed")


def _numbered(array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (position of the first entry, part) of each part."""
    yield from ((number * COPY_ITEMS, part) for number, part in enumerate(in_parts(array)))
