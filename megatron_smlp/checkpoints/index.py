"""Check the index of a distributed checkpoint: the pieces of every tensor make up the tensor.

Ranks write pieces, and `.metadata` says where each belongs and lies. Torch reads a tensor of which
a part is missing as whatever the memory held before, and one with overlapping pieces in any order.
Its own check of a plan is private, and answers differently from version to version.
"""

from __future__ import annotations

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
    """Return whether boxes lie in a box from the origin of this size, and have its volume. Two that
    overlap by as much as there are gaps are taken for whole: no accident makes them."""

    def lies_inside(offsets: Sequence[int], sizes: Sequence[int]) -> bool:
        return len(offsets) == len(sizes) == len(size) and all(
            0 <= at <= at + length <= end
            for at, length, end in zip(offsets, sizes, size, strict=True)
        )

    is_inside = all(lies_inside(*box) for box in pieces)
    return is_inside and sum(math.prod(sizes) for _, sizes in pieces) == math.prod(size)
