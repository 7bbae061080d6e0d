"""A damaged piece of a tensor is noticed, whatever part of it is read."""

from pathlib import Path

import pytest
import torch

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
