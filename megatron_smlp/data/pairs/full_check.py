"""Check every rule that a pair must satisfy over all of its bytes, in parts."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_smlp.data.pairs.indexed import (
    COPY_ITEMS,
    Index,
    bin_path,
    damage,
    idx_path,
    in_parts,
    open_index,
    strip_suffix,
)
from megatron_smlp.data.pairs.manifest import PairRecord, find_manifest, sha256_of
from megatron_smlp.errors import DataError

Array = NDArray[Any]


def validate(prefix: str, *, vocab_size: int | None = None) -> Iterator[tuple[str, str | None]]:
    """Yield each rule once it is checked, with what is wrong, or None if it holds.

    Args:
        vocab_size: entries of the vocabulary; None takes it from the manifest.
    """
    prefix = strip_suffix(prefix)
    try:
        index = open_index(prefix)
        origin = find_manifest(prefix)
    except DataError as error:
        yield "files, header and sizes", str(error)
        return
    yield "files, header and sizes", None
    size = vocab_size or (origin.manifest.tokenizer.vocab_size if origin else None)
    checks = {rule: partial(check, index) for rule, check in INDEX_RULES.items()}
    checks["token ids"] = partial(check_ids, index, size)
    if origin is not None:
        checks["checksums of the manifest"] = partial(_check_checksums, index, origin.pair)
    for rule, check in checks.items():
        try:
            check()
        except DataError as error:
            yield rule, str(error)
        else:
            yield rule, None
    if origin is None:
        yield "manifest (none: counts and checksums unknown)", None


def require_sound_index(index: Index) -> None:
    """Raise `DataError` at the first rule that `.idx` violates."""
    for check in INDEX_RULES.values():
        try:
            check(index)
        except DataError as error:
            raise damage(idx_path(index.prefix), str(error)) from None


def check_lengths(index: Index) -> None:
    """Raise `DataError` at the first negative length."""
    where = _first(index.lengths, lambda _, lengths: lengths < 0)
    if where is not None:
        raise DataError(f"sequence {where} has length {index.lengths[where]}")


def check_pointers(index: Index) -> None:
    """Raise `DataError` at the first pointer that is not where the sequence before it ends."""
    size = index.dtype.itemsize

    def is_wrong(at: int, lengths: Array) -> Array:
        steps = np.diff(index.pointers[at : at + len(lengths) + 1])
        return steps != lengths[: len(steps)].astype(np.int64) * size

    before = _first(index.lengths, is_wrong)
    if before is not None:
        raise DataError(
            f"sequence {before + 1} points at byte {index.pointers[before + 1]}, but the sequence "
            f"before it ends at byte {index.pointers[before] + int(index.lengths[before]) * size}"
        )


def check_documents(index: Index) -> None:
    """Raise `DataError` at the first document that starts before the previous one."""
    starts = index.documents
    before = _first(starts, lambda at, part: np.diff(starts[at : at + len(part) + 1]) < 0)
    if before is not None:
        raise DataError(
            f"document {before + 1} starts at sequence {starts[before + 1]}, before its predecessor"
        )


INDEX_RULES: dict[str, Callable[[Index], None]] = {
    "sequence lengths": check_lengths,
    "byte pointers": check_pointers,
    "document starts": check_documents,
}


def check_ids(index: Index, vocab_size: int | None, *, blocks: Sequence[slice] = ()) -> None:
    """Raise `DataError` at the first id outside 0 to `vocab_size` - 1.

    Args:
        blocks: the tokens to check; if empty, all of them.
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
                f"0 to {limit - 1}"
            )


def _check_checksums(index: Index, pair: PairRecord) -> None:
    """Raise `DataError` if the SHA-256 of a file is not that in the manifest."""
    for path, expected in (
        (idx_path(index.prefix), pair.idx_sha256),
        (bin_path(index.prefix), pair.bin_sha256),
    ):
        if sha256_of(path) != expected:
            raise DataError(f"SHA-256 of {path} differs from the manifest: its bytes changed")


def _first(array: Array, is_wrong: Callable[[int, Array], Array]) -> int | None:
    """Return the first entry that `is_wrong(position of the part's first entry, part)` marks."""
    for at, part in _numbered(array):
        if len(wrong := np.flatnonzero(is_wrong(at, part))):
            return at + int(wrong[0])
    return None


def _numbered(array: Array) -> Iterator[tuple[int, Array]]:
    """Yield (position of the first entry, part) of each part."""
    yield from ((number * COPY_ITEMS, part) for number, part in enumerate(in_parts(array)))
