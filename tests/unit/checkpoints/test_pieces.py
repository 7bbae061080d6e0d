"""The index of a distributed checkpoint: pieces of a tensor that are not the whole are named."""

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, ChunkStorageMetadata

from megatron_smlp.checkpoints.folders import iteration_folder
from megatron_smlp.checkpoints.reader import TorchDistReader
from megatron_smlp.checkpoints.safe_unpickling import load_metadata
from megatron_smlp.checkpoints.writer import TorchDistWriter
from megatron_smlp.errors import DamagedCheckpointError


def lie(metadata: Any, kind: str) -> None:
    name, entry = next(
        (name, entry)
        for name, entry in metadata.state_dict_metadata.items()
        if not isinstance(entry, BytesStorageMetadata) and len(entry.size) == 2
    )
    places = {index: place for index, place in metadata.storage_data.items() if index.fqn == name}
    rows, columns = entry.size
    match kind:
        case "gap" | "overlap":  # two pieces in place of one
            ends = [(0, 1 if kind == "gap" else rows), (rows - 1, 1)]
            entry.chunks[:] = [
                ChunkStorageMetadata(torch.Size([at, 0]), torch.Size([count, columns]))
                for at, count in ends
            ]
            for chunk in entry.chunks:
                index = dataclasses.replace(next(iter(places)), offset=chunk.offsets)
                metadata.storage_data[index] = next(iter(places.values()))
        case "outside":
            entry.size = torch.Size([rows - 1, columns])
        case "nowhere":
            for index in places:
                del metadata.storage_data[index]


LIES = {
    "gap": "overlap, leave gaps",
    "overlap": "overlap, leave gaps",
    "outside": "lie outside",
    "nowhere": "does not say where",
}


@pytest.mark.parametrize("kind", LIES)
def test_an_index_that_lies_is_refused(run: Path, kind: str):
    """By the tools; a run takes the same reader, see test_safe_loading.py."""
    path = iteration_folder(run, 6) / ".metadata"
    with path.open("rb") as file:
        metadata = load_metadata(file)
    TorchDistReader(path.parent)
    lie(metadata, kind)
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(DamagedCheckpointError, match=rf"{path}[^\n]*{LIES[kind]}[^\n]*$"):
        TorchDistReader(path.parent)


def test_rows_are_not_read_of_a_piece_that_is_damaged_behind_them(tmp_path: Path):
    with TorchDistWriter(tmp_path / "one") as writer:
        writer.add("weight", torch.ones(1000, 1000))
    shard = tmp_path / "one" / "__0_0.distcp"
    data = bytearray(shard.read_bytes())
    data[len(data) * 9 // 10] ^= 1
    shard.write_bytes(bytes(data))
    with pytest.raises(DamagedCheckpointError, match="CRC"):
        TorchDistReader(tmp_path / "one").read_into(torch.empty(100, 1000), "weight")
