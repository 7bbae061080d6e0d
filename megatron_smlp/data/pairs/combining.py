"""Pairs from pairs: merge several into one, split one by documents. Ids are copied in parts."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_smlp.data.pairs.indexed import Index, bin_path, idx_path, open_index, strip_suffix
from megatron_smlp.data.pairs.manifest import (
    Manifest,
    TokenizerRecord,
    check_manifest_path,
    check_output_prefix,
    find_manifest,
    is_whole,
)
from megatron_smlp.data.pairs.writer import PairWriter, lock_output, publish
from megatron_smlp.durable import empty_locked, remove_locked
from megatron_smlp.errors import DataError

COPY_DOCUMENTS = 1 << 16
WIDER = {np.dtype("uint16"), np.dtype("int32")}


def find_pairs(inputs: Sequence[str], *, output_prefix: str) -> list[str]:
    """Return the prefixes of folders (every pair in them, sorted) and of prefixes, in this order.

    A pair that is found again, perhaps through a link, is left out, as the user is told.

    Raises:
        DataError: a folder without a pair, a lone `.bin` or `.idx`, or the output as its own input.
    """
    found: dict[tuple[Path, Path], str] = {}
    for name in inputs:
        # Training keeps its cache in a folder of the pair's own name.
        is_folder = Path(name).is_dir() and not idx_path(name).is_file()
        for prefix in _pairs_in(Path(name)) if is_folder else [strip_suffix(name)]:
            if first := found.get(_files_of(prefix)):
                print(f"note: {prefix} is {first} again: merged once", file=sys.stderr)
            else:
                found[_files_of(prefix)] = prefix
    if _files_of(output_prefix) in found:
        raise DataError(f"--output-prefix {output_prefix} is one of the inputs; give another name")
    return list(found.values())


def _files_of(prefix: str) -> tuple[Path, Path]:
    """Return both files behind links; documents of equal lengths may share an index."""
    return bin_path(prefix).resolve(), idx_path(prefix).resolve()


def _pairs_in(folder: Path) -> list[str]:
    halves = [path for path in folder.iterdir() if path.suffix in (".bin", ".idx")]
    stems = sorted({path.with_suffix("") for path in halves if path.is_file()})
    if not stems:
        raise DataError(f"--input {folder}: the folder holds no .bin/.idx pair")
    for stem in stems:
        for path in (bin_path(str(stem)), idx_path(str(stem))):
            if not path.is_file():
                raise DataError(f"--input {folder}: {path.name} is missing beside its other half")
    return [str(stem) for stem in stems]


def merge(prefixes: Sequence[str], *, output_prefix: str, allow_mismatch: bool = False) -> None:
    """Concatenate pairs, in order, into `output_prefix.bin/.idx`, and their manifests.

    uint16 and int32 pairs merge into int32. Without a manifest for every input, or with tokenizers
    that differ and are allowed to, the result has no manifest.

    Raises:
        DataError: a damaged pair, types that do not merge, or tokenizers that differ.
    """
    # One pair is open at a time: each map of a file counts as an open one, which are limited.
    dtypes = [open_index(prefix).dtype for prefix in prefixes]
    manifests = [_manifest_of(prefix) for prefix in prefixes]
    tokenizer_agrees = _check_tokenizers(prefixes, manifests, allow_mismatch)
    dtype = _common_dtype(prefixes, dtypes)
    with scratch_folder(output_prefix) as folder:
        writer = PairWriter(folder / "merged", dtype=dtype)
        for index in map(open_index, prefixes):
            for part in document_parts(index, 0, index.num_documents):
                copy_documents(index, writer, part)
        known = [manifest for manifest in manifests if manifest is not None]
        record = writer.finish(key=_joined(known, "key"), level=_joined(known, "level"))
        manifest = None
        if tokenizer_agrees and len(known) == len(prefixes):
            manifest = Manifest(
                tokenizer=known[0].tokenizer,
                pairs={Path(output_prefix).name: record},
                sources=[{"pair": prefix} for prefix in prefixes],
                counts={"documents": record.documents, "tokens": record.tokens},
            )
        publish(
            {output_prefix: writer}, manifest=manifest, manifest_path=Path(output_prefix + ".json")
        )


def _manifest_of(prefix: str) -> Manifest | None:
    """Return the manifest, narrowed to this pair, once its fingerprint agrees."""
    found = find_manifest(prefix)
    if found is None:
        return None
    path, manifest = found
    if not is_whole(prefix, manifest):
        raise DataError(f"{prefix!r} is not what its manifest {path} describes; validate it")
    name = Path(prefix).name
    return replace(manifest, pairs={name: manifest.pairs[name]})


def _check_tokenizers(
    prefixes: Sequence[str], manifests: list[Manifest | None], allow_mismatch: bool
) -> bool:
    first: tuple[str, Manifest] | None = None
    for prefix, manifest in zip(prefixes, manifests, strict=True):
        if manifest is None:
            continue
        if first is None:
            first = prefix, manifest
        elif _without_name(manifest.tokenizer) != _without_name(first[1].tokenizer):
            if allow_mismatch:
                return False
            ours, theirs = asdict(manifest.tokenizer), asdict(first[1].tokenizer)
            differences = ", ".join(
                f"{name} {value} against {theirs[name]}"
                for name, value in ours.items()
                if value != theirs[name]
            )
            raise DataError(
                f"{prefix!r} and {first[0]!r} were not written with the same tokenizer "
                f"settings ({differences}); preprocess "
                f"one of them again, or pass --allow-tokenizer-mismatch if the ids mean the same"
            )
    return True


def _without_name(record: TokenizerRecord) -> TokenizerRecord:
    """Leave out the type, which does not matter where the vocabulary is known."""
    return replace(record, type="") if record.identity else record


def _common_dtype(prefixes: Sequence[str], dtypes: list[np.dtype[Any]]) -> np.dtype[Any]:
    kinds = set(dtypes)
    if len(kinds) == 1:
        return kinds.pop()
    if kinds <= WIDER:
        return np.dtype("int32")
    pairs = zip(prefixes, dtypes, strict=True)
    names = ", ".join(sorted(f"{prefix!r}: {dtype}" for prefix, dtype in pairs))
    raise DataError(f"only uint16 and int32 pairs merge with one another, not {names}")


def _joined(manifests: list[Manifest], name: str) -> str:
    values = {getattr(pair, name) for manifest in manifests for pair in manifest.pairs.values()}
    return "+".join(sorted(values)) or "document"


@contextlib.contextmanager
def scratch_folder(output_prefix: str) -> Iterator[Path]:
    """Make a folder beside the output, empty but for its lock, which is gone afterwards.

    Raises:
        DataError: the manifest would replace another file, or another process writes there.
    """
    check_output_prefix(output_prefix)
    check_manifest_path(Path(output_prefix + ".json"), pairs=[Path(output_prefix).name])
    folder = Path(output_prefix + ".merging")  # `.partial` is a preprocessing's, to be resumed
    lock = lock_output(folder, output_prefix)
    try:
        empty_locked(folder)
        yield folder
    finally:
        remove_locked(folder, lock)


def document_parts(index: Index, first: int, last: int) -> Iterator[range]:
    """Cut documents `first` to `last` (without it) into ranges of a bounded number."""
    for start in range(first, last, COPY_DOCUMENTS):
        yield range(start, min(start + COPY_DOCUMENTS, last))


def copy_documents(index: Index, writer: PairWriter, documents: range) -> None:
    """Append a range of consecutive documents of `index`."""
    starts = index.documents[documents.start : documents.stop + 1]
    lengths = index.lengths[starts[0] : starts[-1]]
    pointers = index.pointers[starts[0] : starts[-1]]
    # Documents at the end of a pair may be empty.
    begin = int(pointers[0]) // index.dtype.itemsize if len(pointers) else 0
    ends = begin + np.cumsum(lengths, dtype=np.int64)
    if (np.diff(starts) < 0).any() or not np.array_equal(
        pointers[1:], ends[:-1] * index.dtype.itemsize
    ):
        raise DataError(
            f"{idx_path(index.prefix)} is damaged; see tools/inspect_dataset.py validate"
        )
    ids: NDArray[Any] = index.tokens[begin : begin + int(lengths.sum(dtype=np.int64))]
    writer.write(ids, lengths=lengths, sequences=np.diff(starts))
