"""Check the index of a distributed checkpoint: the pieces of every tensor make up the tensor.

Ranks write pieces, and `.metadata` says where each belongs and lies. Torch reads a tensor of which
a part is missing as whatever the memory held before, and one with overlapping pieces in any order.
Its own check of a plan is private, and answers differently from version to version.
"""

from __future__ import annotations

import itertools
import math
import os
import pickle
from collections.abc import Sequence
from typing import IO

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
)

from megatron_smlp.errors import DamagedCheckpointError

MOST_DIMENSIONS = 8
"""A box has 2 ** dimensions corners."""

Box = tuple[Sequence[int], Sequence[int]]
"""Offsets and sizes."""
Piece = tuple[tuple[int, ...], torch.dtype]
"""Sizes and type."""


def check_metadata(metadata: Metadata) -> None:
    """Check the whole index, and note at each place of a tensor what has to be there: `piece`.

    Raises:
        pickle.UnpicklingError: with what is wrong in it.
        AttributeError, TypeError: it is not made of what an index is made of.
    """
    places = metadata.storage_data or {}
    for place in places.values():
        path = place.relative_path
        if os.sep in path or path in ("", ".", ".."):
            raise pickle.UnpicklingError(f"it names {path!r:.60}, in another folder")
    for name, entry in metadata.state_dict_metadata.items():
        pieces: dict[MetadataIndex, Piece | None] = {MetadataIndex(name): None}
        if not isinstance(entry, BytesStorageMetadata):
            dtype = entry.properties.dtype
            if not tile([(chunk.offsets, chunk.sizes) for chunk in entry.chunks], entry.size):
                raise pickle.UnpicklingError(
                    f"the pieces of {name} overlap, leave gaps or lie outside of {list(entry.size)}"
                )
            pieces = {MetadataIndex(name, c.offsets): (tuple(c.sizes), dtype) for c in entry.chunks}
        for index, piece in pieces.items():
            if index not in places:
                raise pickle.UnpicklingError(f"it does not say where {name} is")
            places[index].piece = piece


def check_piece(stored: IO[bytes], piece: Piece, name: str) -> Tensor:
    """Compare what is stored with what the index says; torch would take a part of a larger piece,
    and convert one of another type.

    Returns:
        the piece on the meta device.

    Raises:
        DamagedCheckpointError: they are not the same.
    """
    written: Tensor = torch.load(stored, map_location="meta", weights_only=True)
    if not isinstance(written, Tensor) or (tuple(written.shape), written.dtype) != piece:
        raise DamagedCheckpointError(
            f"a piece of {name} is not {list(piece[0])} of {piece[1]}: the checkpoint is damaged."
        )
    return written


def tile(pieces: Sequence[Box], size: Sequence[int]) -> bool:
    """Return true if boxes cover a box from the origin of this size, each place of it once.

    A point that is a corner of an odd number of boxes is a corner of what an odd number of boxes
    covers. If these are the corners of the whole, every place is covered at least once; if the
    volumes add up to that of the whole too, exactly once. No pair of boxes is compared.
    """
    dimensions = len(size)
    lists = [size, *(values for box in pieces for values in box)]
    if dimensions > MOST_DIMENSIONS or any(len(values) != dimensions for values in lists):
        return False
    if any(value < 0 for values in lists for value in values):
        return False
    if sum(math.prod(sizes) for _, sizes in pieces) != math.prod(size):
        return False
    odd: set[tuple[int, ...]] = set()
    for offsets, sizes in [*pieces, ((0,) * dimensions, size)]:
        if math.prod(sizes):
            ends = [(begin, begin + length) for begin, length in zip(offsets, sizes, strict=True)]
            for corner in itertools.product(*ends):
                odd ^= {corner}
    return not odd
