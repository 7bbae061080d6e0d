"""The files of a checkpoint that a conversion writes, and damaged pieces of their tensors."""

from pathlib import Path

import pytest
import torch

from megatron_smlp.checkpoints import writer as writing
from megatron_smlp.checkpoints.reader import TorchDistReader
from megatron_smlp.checkpoints.writer import TorchDistWriter
from megatron_smlp.errors import DamagedCheckpointError


def test_rows_are_not_read_of_a_piece_that_is_damaged_behind_them(tmp_path: Path):
    with TorchDistWriter(tmp_path / "one") as writer:
        writer.add("weight", torch.ones(1000, 1000))
    shard = tmp_path / "one" / "__0_0.distcp"
    data = bytearray(shard.read_bytes())
    data[len(data) * 9 // 10] ^= 1
    shard.write_bytes(bytes(data))
    with pytest.raises(DamagedCheckpointError, match="CRC"):
        TorchDistReader(tmp_path / "one").read_into(torch.empty(100, 1000), "weight")


def test_tensors_are_spread_over_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(writing, "SHARD_BYTES", 10_000)
    wanted = {f"layer{n}.weight": torch.full((1000,), float(n)) for n in range(5)}
    with TorchDistWriter(tmp_path / "one") as writer:
        for name, tensor in wanted.items():
            writer.add(name, tensor)
    shards = {path.name for path in (tmp_path / "one").glob("*.distcp")}
    assert shards == {"__0_0.distcp", "__0_1.distcp", "__0_2.distcp"}
    for name, tensor in wanted.items():
        read = torch.empty(1000)
        TorchDistReader(tmp_path / "one").read_into(read, name)
        assert read.equal(tensor)
