"""The index of a distributed checkpoint: pieces of a tensor that are not the whole are named."""

import dataclasses
import pickle
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, ChunkStorageMetadata

from megatron_smlp.checkpoints.folders import iteration_folder
from megatron_smlp.checkpoints.index import tile
from megatron_smlp.checkpoints.reader import TorchDistReader
from megatron_smlp.checkpoints.safe_unpickling import load_metadata
from megatron_smlp.checkpoints.writer import TorchDistWriter
from megatron_smlp.errors import DamagedCheckpointError

Box = tuple[tuple[int, ...], tuple[int, ...]]


def covers(pieces: Sequence[Box], size: Sequence[int]) -> bool:
    """The slow twin of `tile`: count how often each place is covered."""
    count = torch.zeros(size, dtype=torch.int64)
    inside = 0
    for offsets, sizes in pieces:
        part = tuple(slice(at, at + length) for at, length in zip(offsets, sizes, strict=True))
        count[part] += 1
        inside += count[part].numel()
    volume = sum(int(torch.tensor(sizes, dtype=torch.int64).prod()) for _, sizes in pieces)
    return bool((count == 1).all()) and volume == inside


def cut(rng: random.Random, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> list[Box]:
    """A box in pieces, by random cuts across one dimension at a time."""
    dimension = rng.randrange(len(sizes))
    if sizes[dimension] < 2 or rng.random() < 0.2:
        return [(offsets, sizes)]
    first = rng.randrange(1, sizes[dimension])
    rest = sizes[dimension] - first
    at = offsets[dimension] + first
    return [
        *cut(rng, offsets, (*sizes[:dimension], first, *sizes[dimension + 1 :])),
        *cut(
            rng,
            (*offsets[:dimension], at, *offsets[dimension + 1 :]),
            (*sizes[:dimension], rest, *sizes[dimension + 1 :]),
        ),
    ]


@given(seed=st.integers(0, 10**6), size=st.lists(st.integers(1, 5), min_size=1, max_size=3))
def test_tiling_is_what_counting_says(seed: int, size: list[int]) -> None:
    rng = random.Random(seed)
    pieces = cut(rng, (0,) * len(size), tuple(size))
    assert tile(pieces, size)
    assert covers(pieces, size)
    number, part = rng.randrange(len(pieces)), rng.randrange(2)
    box = [list(values) for values in pieces[number]]
    box[part][rng.randrange(len(size))] += rng.choice([-1, 1, 2])
    pieces[number] = (tuple(box[0]), tuple(box[1]))
    if min(map(min, box)) >= 0:
        assert tile(pieces, size) == covers(pieces, size)
    else:
        assert not tile(pieces, size)
    if rng.random() < 0.5:  # volumes that agree again
        pieces.append(rng.choice(pieces))
        pieces.pop(rng.randrange(len(pieces)))
        if all(value >= 0 for piece in pieces for values in piece for value in values):
            assert tile(pieces, size) == covers(pieces, size)


def test_corners_of_the_smallest_tensors() -> None:
    assert tile([((), ())], ())
    assert not tile([], ())
    assert not tile([((), ()), ((), ())], ())
    assert tile([], (0, 3))
    assert tile([((0, 0), (0, 3))], (0, 3))
    assert not tile([((0,), (3,))], (0, 3))


def _first_tensor(metadata: Any) -> tuple[str, Any]:
    return next(
        (name, entry)
        for name, entry in metadata.state_dict_metadata.items()
        if not isinstance(entry, BytesStorageMetadata) and len(entry.size) == 2
    )


def _halves(metadata: Any, first: int, second: int) -> None:
    """Two pieces in place of one, of so many rows."""
    name, entry = _first_tensor(metadata)
    rows, columns = entry.size
    chunks = [
        ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([first, columns])),
        ChunkStorageMetadata(torch.Size([rows - second, 0]), torch.Size([second, columns])),
    ]
    metadata.state_dict_metadata[name] = dataclasses.replace(entry, chunks=chunks)
    place = next(p for index, p in metadata.storage_data.items() if index.fqn == name)
    for chunk in chunks:
        index = type(next(iter(metadata.storage_data)))(name, chunk.offsets)
        metadata.storage_data[index] = place


def gap(metadata: Any) -> None:
    _halves(metadata, 1, 1)


def overlap(metadata: Any) -> None:
    rows = _first_tensor(metadata)[1].size[0]
    _halves(metadata, rows, 1)


def outside(metadata: Any) -> None:
    name, entry = _first_tensor(metadata)
    metadata.state_dict_metadata[name] = dataclasses.replace(
        entry, size=torch.Size([entry.size[0] - 1, entry.size[1]])
    )


def missing(metadata: Any) -> None:
    name, entry = _first_tensor(metadata)
    metadata.state_dict_metadata[name] = dataclasses.replace(entry, chunks=[])


def negative(metadata: Any) -> None:
    next(iter(metadata.storage_data.values())).offset = -4


def nowhere(metadata: Any) -> None:
    name = _first_tensor(metadata)[0]
    for index in [index for index in metadata.storage_data if index.fqn == name]:
        del metadata.storage_data[index]


def of_no_type(metadata: Any) -> None:
    _first_tensor(metadata)[1].properties.dtype = "float32"


def of_text(metadata: Any) -> None:
    metadata.state_dict_metadata = "text"


def described_by_a_list(metadata: Any) -> None:
    metadata.state_dict_metadata[_first_tensor(metadata)[0]] = [1]


LIES: dict[Callable[[Any], None], str] = {
    gap: "overlap, leave gaps",
    overlap: "overlap, leave gaps",
    outside: "lie outside",
    missing: "leave gaps",
    negative: "at byte -4",
    nowhere: "does not say where",
    of_no_type: "of what type",
    of_text: "no attribute",
    described_by_a_list: "describes",
}


@pytest.mark.parametrize("lie", LIES)
def test_an_index_that_lies_is_refused(run: Path, lie: Callable[[Any], None]) -> None:
    """By the tools; a run takes the same reader, see test_safe_loading.py."""
    path = iteration_folder(run, 6) / ".metadata"
    with path.open("rb") as file:
        metadata = load_metadata(file)
    TorchDistReader(path.parent)
    lie(metadata)
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(DamagedCheckpointError, match=LIES[lie]) as error:
        TorchDistReader(path.parent)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_rows_are_not_read_of_a_piece_that_is_damaged_behind_them(tmp_path: Path) -> None:
    with TorchDistWriter(tmp_path / "one") as writer:
        writer.add("weight", torch.ones(1000, 1000))
    shard = tmp_path / "one" / "__0_0.distcp"
    data = bytearray(shard.read_bytes())
    data[len(data) * 9 // 10] ^= 1
    shard.write_bytes(bytes(data))
    with pytest.raises(DamagedCheckpointError, match="CRC"):
        TorchDistReader(tmp_path / "one").read_into(torch.empty(100, 1000), "weight")
