"""Some rows at a time: what several passes over memory read is then still in a core's cache."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor


def in_rows(elements: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield views of the same rows of all: so many that the first one's have `elements` at most.

    tensors: [n, D], then [n] or [n, ...]. A row that is longer goes alone.
    """
    count = max(1, elements // tensors[0].shape[1])
    return zip(*(tensor.split(count) for tensor in tensors), strict=True)
