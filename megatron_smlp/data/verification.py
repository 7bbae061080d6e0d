"""What training checks before it starts: quick at any size, one readable line on failure."""

from pathlib import Path

from megatron_smlp.data.errors import DataError
from megatron_smlp.data.indexed import Index, bin_path, idx_path, open_index, strip_suffix
from megatron_smlp.data.manifest import Manifest, PairRecord, find_manifest, fingerprint_of


def verify_for_training(
    prefix: str,
    tokenizer_identity: str | None = None,
    *,
    vocab_size: int | None = None,
    override_flag: str = "--allow-tokenizer-mismatch",
) -> None:
    """Refuse a dataset that training would misread.

    Reads the header and the ends of the index, the sizes, up to 4 MiB of the contents, and the
    manifest where there is one (data from other tools has none, which is no error).

    Args:
        prefix: path of the pair without `.bin`/`.idx`.
        tokenizer_identity: `tokenizers.identity_from_arguments(args)` of the training run; None
            skips the comparison of vocabularies.
        vocab_size: entries of the training vocabulary, before padding; None skips the check.
        override_flag: the training flag that the message names as the way around a mismatch.

    Raises:
        DataError: (a ValueError) missing or damaged files, changed since they were written,
            another tokenizer, or ids outside of the vocabulary.
    """
    index = open_index(strip_suffix(prefix))
    if index.num_sequences == 0:
        raise DataError(f"the dataset {prefix!r} holds no tokens; preprocess a corpus with text")
    found = find_manifest(index.prefix)
    if found is None:
        return
    path, manifest = found
    pair = manifest.pairs[Path(index.prefix).name]
    _check_unchanged(index, pair, path)
    _check_tokenizer(index, manifest, path, tokenizer_identity, override_flag)
    if vocab_size is not None and pair.max_id >= vocab_size:
        raise DataError(
            f"the dataset {index.prefix!r} holds token id {pair.max_id}, but this run's vocabulary "
            f"has only the ids 0 to {vocab_size - 1}; train with the tokenizer that wrote the data "
            f"({manifest.tokenizer.type}, {manifest.tokenizer.vocab_size} entries)"
        )


def _check_unchanged(index: Index, pair: PairRecord, manifest_path: Path) -> None:
    if index.dtype.name != pair.dtype:
        raise DataError(
            f"{idx_path(index.prefix)} says {index.dtype} ids, but its manifest {manifest_path} "
            f"says {pair.dtype}: the index was damaged or replaced; preprocess again"
        )
    if fingerprint_of(bin_path(index.prefix), idx_path(index.prefix)) != pair.fingerprint:
        raise DataError(
            f"the dataset {index.prefix!r} is not what its manifest {manifest_path} describes: a "
            f"file was damaged or swapped; see tools/inspect_dataset.py validate"
        )


def _check_tokenizer(
    index: Index, manifest: Manifest, path: Path, identity: str | None, override_flag: str
) -> None:
    written = manifest.tokenizer
    if identity is None or written.identity is None or identity == written.identity:
        return
    raise DataError(
        f"the dataset {index.prefix!r} was written with another tokenizer ({written.type}, "
        f"{written.vocab_size} entries, vocabulary {written.identity[:12]}) than this run has "
        f"(vocabulary {identity[:12]}), see {path}; give the same tokenizer, preprocess again, "
        f"or pass {override_flag} if the ids mean the same"
    )
