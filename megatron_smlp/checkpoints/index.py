"""Check the index of a distributed checkpoint: the pieces of every tensor make up the tensor.

Ranks write pieces, and `.metadata` says where each belongs and lies. Torch reads a tensor of which
a part is missing as whatever the memory held before, and one with overlapping pieces in any order.
"""

from __future__ import annotations

import itertools
import math
import os
import pickle
from collections.abc import Mapping, Sequence
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_smlp.errors import DamagedCheckpointError

MOST_DIMENSIONS = 8

Box = tuple[Sequence[int], Sequence[int]]
"""Offsets and sizes."""
Piece = tuple[tuple[int, ...], torch.dtype]
"""Sizes and type."""


def check_metadata(metadata: Any) -> None:
    """Check the whole index, and note at each place of a tensor what has to be there: `piece`.

    Raises:
        pickle.UnpicklingError: with what is wrong in it.
    """
    if not isinstance(metadata, Metadata):
        raise pickle.UnpicklingError(f"it holds a {type(metadata).__name__}")
    entries, places = metadata.state_dict_metadata, metadata.storage_data or {}
    if not isinstance(entries, dict) or not isinstance(places, dict):
        raise pickle.UnpicklingError("it lists no tensors and places")
    for index, place in places.items():
        _check_place(index, place)
    for name, entry in entries.items():
        _check_entry(name, entry, places)


def _check_place(index: Any, place: Any) -> None:
    if not isinstance(index, MetadataIndex) or not isinstance(place, _StorageInfo):
        raise pickle.UnpicklingError(f"it places {index!r:.60} at {place!r:.60}")
    path = place.relative_path
    if not isinstance(path, str) or os.sep in path or path in ("", ".", ".."):
        raise pickle.UnpicklingError(f"it names {path!r:.60}, in another folder")
    if not are_sizes((place.offset, place.length)):
        raise pickle.UnpicklingError(
            f"it places {index.fqn!r:.60} at byte {place.offset!r:.20} of length "
            f"{place.length!r:.20}"
        )


def _check_entry(name: Any, entry: Any, places: Mapping[Any, Any]) -> None:
    wanted: dict[MetadataIndex, Piece | None]
    if isinstance(entry, BytesStorageMetadata):
        wanted = {MetadataIndex(name): None}
    elif isinstance(entry, TensorStorageMetadata):
        _check_tensor(name, entry)
        dtype = entry.properties.dtype
        wanted = {MetadataIndex(name, c.offsets): (tuple(c.sizes), dtype) for c in entry.chunks}
    else:
        raise pickle.UnpicklingError(f"it describes {name!r:.60} as {entry!r:.60}")
    for index, piece in wanted.items():
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
        what = "no tensor"
        if isinstance(written, Tensor):
            what = f"{list(written.shape)} of {written.dtype}"
        raise DamagedCheckpointError(
            f"a piece of {name} is {what}, not {list(piece[0])} of {piece[1]}: the checkpoint is "
            "damaged."
        )
    return written


def _check_tensor(name: str, entry: TensorStorageMetadata) -> None:
    properties, chunks = entry.properties, entry.chunks
    if not isinstance(properties, TensorProperties) or not isinstance(
        properties.dtype, torch.dtype
    ):
        raise pickle.UnpicklingError(f"it does not say of what type {name} is")
    is_list = isinstance(chunks, list) and all(isinstance(c, ChunkStorageMetadata) for c in chunks)
    if not is_list or not are_sizes(entry.size) or len(entry.size) > MOST_DIMENSIONS:
        raise pickle.UnpicklingError(f"it does not say of what size {name} and its pieces are")
    if not tile([(chunk.offsets, chunk.sizes) for chunk in chunks], entry.size):
        raise pickle.UnpicklingError(
            f"the pieces of {name} overlap, leave gaps or lie outside of {list(entry.size)}"
        )


def are_sizes(values: Any) -> bool:
    """Return true for a tuple of integers of 0 or more."""
    return isinstance(values, tuple) and all(
        isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in values
    )


def tile(pieces: Sequence[Box], size: Sequence[int]) -> bool:
    """Return true if boxes cover a box from the origin of this size, each place of it once.

    A point that is a corner of an odd number of boxes is a corner of what an odd number of boxes
    covers. If these are the corners of the whole, every place is covered at least once; if the
    volumes add up to that of the whole too, exactly once. No pair of boxes is compared.
    """
    dimensions = len(size)
    if any(not are_sizes(part) or len(part) != dimensions for box in pieces for part in box):
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
