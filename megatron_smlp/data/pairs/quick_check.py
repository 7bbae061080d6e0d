"""Check a dataset before training: quick at any size, with one readable line on failure."""

from megatron_smlp.data.pairs.content import BLOCK_BYTES, WHOLE_BYTES, block_starts, sha256_once
from megatron_smlp.data.pairs.full_check import check_ids, require_sound_index
from megatron_smlp.data.pairs.indexed import Index, bin_path, idx_path, open_index
from megatron_smlp.data.pairs.manifest import Origin, find_manifest, is_unchanged
from megatron_smlp.errors import DataError


def verify_for_training(
    prefix: str,
    tokenizer_identity: str | None = None,
    *,
    vocab_size: int | None = None,
) -> None:
    """Refuse a dataset that training would misread.

    Reads all of the index, and the manifest if there is one (data from other tools has none, which
    is not an error). A `.bin` of up to 256 MiB is checked in full; a larger one by the manifest's
    fingerprint of its first and last MiB or, without one, by the ids of 64 MiB spread over it.

    Args:
        prefix: path of the pair without `.bin`/`.idx`.
        tokenizer_identity: `tokenizers.identity_from_arguments(args)` of the training run; None
            skips the comparison of vocabularies.
        vocab_size: entries of the training vocabulary, before padding; None skips the check.

    Raises:
        DataError: (a ValueError) files are missing, damaged, or changed since they were written,
            the tokenizer is another one, or ids are outside the vocabulary.
    """
    index = open_index(prefix)
    if not index.num_tokens:
        raise DataError(f"the dataset {prefix!r} holds no tokens; preprocess a corpus with text")
    require_sound_index(index)
    origin = find_manifest(index.prefix)
    if origin is not None:
        _check_unchanged(index, origin)
        _check_tokenizer(index, origin, tokenizer_identity)
    if vocab_size is not None:
        _check_vocabulary(index, origin, vocab_size)


def _check_unchanged(index: Index, origin: Origin) -> None:
    data = bin_path(index.prefix)
    is_same = sha256_once(idx_path(index.prefix)) == origin.pair.idx_sha256
    if data.stat().st_size <= WHOLE_BYTES:
        is_same = is_same and sha256_once(data) == origin.pair.bin_sha256
    if not (is_same and is_unchanged(index.prefix, origin.pair)):
        raise DataError(
            f"the dataset {index.prefix!r} does not match its manifest {origin.path}: a "
            f"file was damaged or swapped; run tools/inspect_dataset.py validate"
        )


def _check_tokenizer(index: Index, origin: Origin, identity: str | None) -> None:
    written = origin.manifest.tokenizer
    if identity is None or written.identity is None or identity == written.identity:
        return
    raise DataError(
        f"the dataset {index.prefix!r} was written with another tokenizer ({written.type}, "
        f"{written.vocab_size} entries, vocabulary {written.identity[:12]}) than this run's "
        f"(vocabulary {identity[:12]}), see {origin.path}; give the same tokenizer, preprocess "
        "again, or pass --allow-tokenizer-mismatch if the ids mean the same"
    )


def _check_vocabulary(index: Index, origin: Origin | None, vocab_size: int) -> None:
    """Check the largest id in the manifest or, without one, the ids themselves; of a large dataset,
    only those in some blocks."""
    if origin is None:
        size, item = index.expected_bin_bytes, index.dtype.itemsize
        starts = block_starts(size) if size > WHOLE_BYTES else []
        blocks = [slice(start // item, (start + BLOCK_BYTES) // item) for start in starts]
        try:
            check_ids(index, vocab_size, blocks=blocks)
        except DataError as error:
            raise DataError(
                f"the dataset {index.prefix!r} exceeds this run's vocabulary of {vocab_size} "
                f"entries, or is damaged: {error}"
            ) from None
        return
    max_id, written = origin.pair.max_id, origin.manifest.tokenizer
    if max_id >= vocab_size:
        raise DataError(
            f"the dataset {index.prefix!r} holds token id {max_id}, but this run's vocabulary has "
            f"only the ids 0 to {vocab_size - 1}; train with the tokenizer that wrote the data "
            f"({written.type}, {written.vocab_size} entries)"
        )
