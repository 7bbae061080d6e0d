"""Check the index of a distributed checkpoint: the pieces of every tensor make up the tensor.

Ranks write pieces, and `.metadata` says where each belongs and lies. Torch reads a tensor of which
a part is missing as whatever the memory held before, and one with overlapping pieces in any order;
what it checks of an index when it writes one is checked here when one is read.
"""

from __future__ import annotations

import os
import pickle
from typing import IO

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import _validate_global_plan
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
)
from torch.distributed.checkpoint.planner import SavePlan

from megatron_smlp.errors import DamagedCheckpointError

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
    # More than one plan: torch compares sizes only where it has those of all ranks.
    if problems := _validate_global_plan([SavePlan([]), SavePlan([])], metadata):
        raise pickle.UnpicklingError(problems[0])
    for name, entry in metadata.state_dict_metadata.items():
        pieces: dict[MetadataIndex, Piece | None] = {MetadataIndex(name): None}
        if not isinstance(entry, BytesStorageMetadata):
            dtype = entry.properties.dtype
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
