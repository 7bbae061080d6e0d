"""Join rows of token ids into flat arrays, and drop ids outside a vocabulary."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def within(ids: Sequence[int], vocab_size: int) -> list[int]:
    """Drop ids of the vocabulary's padding, which libraries cannot decode."""
    return [int(number) for number in ids if number < vocab_size]


def join_ids(
    rows: Sequence[Sequence[int] | NDArray[Any]],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the ids of all rows, <int64>[tokens], and the length of each, <int64>[rows]."""
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    arrays = [np.asarray(row, dtype=np.int64) for row in rows]
    return np.concatenate(arrays) if arrays else np.empty(0, np.int64), lengths
