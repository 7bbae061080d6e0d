"""Merge several pairs into one, with helpers that splitting.py shares. Ids are copied in parts."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from megatron_smlp.data.pairs.full_check import require_sound_index
from megatron_smlp.data.pairs.indexed import Index, bin_path, idx_path, open_index, strip_suffix
from megatron_smlp.data.pairs.manifest import (
    Manifest,
    Origin,
    TokenizerRecord,
    check_manifest_path,
    check_output_prefix,
    find_manifest,
    is_unchanged,
)
from megatron_smlp.data.pairs.writer import PairWriter, publish
from megatron_smlp.errors import DataError

COPY_DOCUMENTS = 1 << 16


def find_pairs(inputs: Sequence[str], *, output_prefix: str) -> list[str]:
    """Return the prefixes that `inputs` name, in order; a folder stands for its pairs, sorted.

    A pair that is named twice, perhaps through a link, is there once.

    Raises:
        DataError: a folder has no pair, or the output is one of the inputs.
    """
    prefixes: dict[Path, str] = {}
    for name in inputs:
        # Training keeps its cache in a folder with the pair's name.
        is_folder = Path(name).is_dir() and not idx_path(name).is_file()
        for prefix in _pairs_in(Path(name)) if is_folder else [strip_suffix(name)]:
            prefixes.setdefault(bin_path(prefix).resolve(), prefix)
    if bin_path(output_prefix).resolve() in prefixes:
        raise DataError(f"--output-prefix {output_prefix} is one of the inputs; give another name")
    return list(prefixes.values())


def _pairs_in(folder: Path) -> list[str]:
    halves = [path for path in folder.iterdir() if path.suffix in (".bin", ".idx")]
    stems = {str(path.with_suffix("")) for path in halves if path.is_file()}
    if not stems:
        raise DataError(f"--input {folder}: the folder holds no .bin/.idx pair")
    return sorted(stems)


def merge(prefixes: Sequence[str], *, output_prefix: str, allow_mismatch: bool = False) -> None:
    """Concatenate pairs, in order, into `output_prefix.bin/.idx`, and their manifests.

    uint16 and int32 pairs merge into int32. If an input has no manifest, or if tokenizers differ
    and are allowed to, the result has no manifest.

    Raises:
        DataError: a pair is damaged or incomplete, tokenizers differ, or the manifest would replace
            another file.
    """
    # Open one pair at a time: each memory map counts as an open file, whose number is limited.
    dtypes = {open_index(prefix).dtype for prefix in prefixes}
    origins = [origin_of(prefix) for prefix in prefixes]
    tokenizer_agrees = _check_tokenizers(prefixes, origins, allow_mismatch)
    name, manifest_path = Path(output_prefix).name, Path(output_prefix + ".json")
    check_manifest_path(manifest_path, pairs=[name])
    with scratch_folder(output_prefix) as folder:
        writer = PairWriter(Path(folder, "merged"), dtype=np.result_type(*dtypes))
        for index in map(open_index, prefixes):
            require_sound_index(index)
            copy_documents(index, writer, 0, index.num_documents)
        known = [origin for origin in origins if origin is not None]
        record = writer.finish(key=_joined(known, "key"), level=_joined(known, "level"))
        manifest = None
        if tokenizer_agrees and len(known) == len(prefixes):
            manifest = Manifest(
                tokenizer=known[0].manifest.tokenizer,
                pairs={name: record},
                sources=[{"pair": prefix} for prefix in prefixes],
                counts={"documents": record.documents, "tokens": record.tokens},
            )
        publish({output_prefix: writer}, manifest=manifest, manifest_path=manifest_path)


def origin_of(prefix: str) -> Origin | None:
    """Return the manifest that lists the pair, if there is one, after checking the fingerprint.

    Raises:
        DataError: the pair is not what its manifest describes.
    """
    origin = find_manifest(prefix)
    if origin and not is_unchanged(prefix, origin.pair):
        raise DataError(f"{prefix!r} does not match its manifest {origin.path}; validate it")
    return origin


def _check_tokenizers(
    prefixes: Sequence[str], origins: list[Origin | None], allow_mismatch: bool
) -> bool:
    pairs = zip(prefixes, origins, strict=True)
    known = [(prefix, origin.manifest.tokenizer) for prefix, origin in pairs if origin]
    for prefix, ours in known[1:]:
        first, theirs = known[0]
        if _without_name(ours) != _without_name(theirs):
            if allow_mismatch:
                return False
            raise DataError(
                f"{prefix!r} and {first!r} were not written with the same tokenizer settings "
                f"({ours}; against {theirs}); preprocess one of them again, or pass "
                "--allow-tokenizer-mismatch if the ids mean the same"
            )
    return True


def _without_name(record: TokenizerRecord) -> TokenizerRecord:
    """Drop the type, which does not matter if the vocabulary is known."""
    return replace(record, type="") if record.identity else record


def _joined(origins: list[Origin], name: str) -> str:
    return "+".join(sorted({getattr(origin.pair, name) for origin in origins})) or "document"


def scratch_folder(output_prefix: str) -> TemporaryDirectory[str]:
    """Return a context manager of a folder beside the output, for what is not yet finished."""
    check_output_prefix(output_prefix)
    output = Path(output_prefix)
    output.parent.mkdir(parents=True, exist_ok=True)
    return TemporaryDirectory(prefix=f"{output.name}.merging-", dir=output.parent)


def copy_documents(index: Index, writer: PairWriter, first: int, last: int) -> None:
    """Append documents `first` to `last` (exclusive) of `index`, a bounded number at a time."""
    for begin in range(first, last, COPY_DOCUMENTS):
        starts = index.documents[begin : min(begin + COPY_DOCUMENTS, last) + 1]
        sequences = int(starts[0]), int(starts[-1])
        ids, lengths = index.tokens_of(*sequences), index.lengths[slice(*sequences)]
        writer.write(ids, lengths=lengths, sequences=np.diff(starts))
