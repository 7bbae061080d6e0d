"""Count the token ids of a corpus."""

import operator
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_smlp.data.blending import Blend
from megatron_smlp.data.pairs.indexed import in_parts, open_index
from megatron_smlp.errors import DataError

Counts = NDArray[np.int64]


def counts_of_datasets(blend: Blend, *, vocab_size: int, part: int = 0, parts: int = 1) -> Counts:
    """Count each id in part number `part` of every dataset, cut into `parts` equal parts.

    Returns:
        <int64>[datasets, V]; without weights [1, V], their sum.

    Raises:
        DataError: a dataset is missing or damaged, or holds an id outside the vocabulary.
    """
    counts = (_counts(prefix, vocab_size, part, parts) for prefix in blend.prefixes)
    if blend.weights is None:
        return reduce(operator.iadd, counts)[np.newaxis]
    return np.stack(list(counts))


def mixture(blend: Blend, parts: Counts) -> Counts:
    """Mix the counts of whole datasets, from `counts_of_datasets`, by their weights: <int64>[V]."""
    if blend.weights is None:
        return np.sum(parts, axis=0, dtype=np.int64)
    total = int(parts.sum())
    weights = np.array(blend.weights) / sum(blend.weights)
    shares = [w * part / max(part.sum(), 1) for w, part in zip(weights, parts, strict=True)]
    return np.rint(total * np.sum(shares, axis=0)).astype(np.int64)


def _counts(prefix: str, vocab_size: int, part: int, parts: int) -> Counts:
    tokens = open_index(prefix).tokens
    first, last = (len(tokens) * place // parts for place in (part, part + 1))
    return counts_in(tokens[first:last], vocab_size=vocab_size, prefix=prefix)


def counts_in(tokens: Any, *, vocab_size: int, prefix: str) -> Counts:
    """Count each id in the tokens of a dataset, read part by part.

    Raises:
        DataError: an id is outside the vocabulary.
    """
    counts = np.zeros(vocab_size, dtype=np.int64)
    for part in in_parts(tokens):
        outside = part[(part < 0) | (part >= vocab_size)]
        if len(outside):
            raise DataError(
                f"{prefix} holds the id {outside[0]}, outside a vocabulary of {vocab_size:,} "
                "ids: give the tokenizer's --vocab-size"
            )
        counts += np.bincount(part, minlength=vocab_size)
    return counts
