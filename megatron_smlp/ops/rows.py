"""A few rows at a time, so that several passes over them find them in a core's cache."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor


def in_rows(elements: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield views of the same rows of all tensors, with at most `elements` elements of the first.

    tensors: [n, D], then [n] or [n, ...]. A row that is longer comes alone.
    """
    count = max(1, elements // tensors[0].shape[1])
    return zip(*(tensor.split(count) for tensor in tensors), strict=True)
