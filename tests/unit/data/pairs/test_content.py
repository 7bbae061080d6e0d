"""The checksum by which caches, checkpoints and jobs know a dataset."""

import os
from pathlib import Path

import pytest

from megatron_smlp.data.pairs import content
from megatron_smlp.data.pairs.content import content_of


def _pair(folder: Path, data: bytes) -> str:
    (folder / "x.idx").write_bytes(b"index")
    (folder / "x.bin").write_bytes(data)
    return str(folder / "x")


def test_names_and_dates_do_not_count(tmp_path: Path) -> None:
    first = content_of(_pair(tmp_path, b"data"))
    os.utime(tmp_path / "x.bin", (1, 1))
    assert content_of(str(tmp_path / "x")) == first
    (tmp_path / "other").mkdir()
    assert content_of(_pair(tmp_path / "other", b"data")) == first
    assert content_of(_pair(tmp_path, b"date")) != first


@pytest.mark.parametrize("at", [0, 499_999, 999_999])
def test_a_large_file_is_looked_at_in_many_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Its ends and its middle: here 64 blocks of 20 kB, which overlap."""
    monkeypatch.setattr(content, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(content, "BLOCK_BYTES", 20_000)
    data = bytearray(1_000_000)
    first = content_of(_pair(tmp_path, data))
    data[at] = 1
    assert content_of(_pair(tmp_path, data)) != first
