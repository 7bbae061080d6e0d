"""Training refuses data that it must not read, and identifies the rest by a checksum."""

from pathlib import Path

import numpy as np
import pytest
from data_helpers import BYTE_FLAGS, Run

from megatron_smlp.data.pairs import content
from megatron_smlp.data.pairs.content import content_of
from megatron_smlp.data.pairs.full_check import validate
from megatron_smlp.data.pairs.indexed import idx_path, open_index, write_index
from megatron_smlp.data.pairs.manifest import read_manifest
from megatron_smlp.data.pairs.quick_check import verify_for_training
from megatron_smlp.errors import DataError


@pytest.fixture
def prefix(run: Run, tmp_path: Path, corpus: Path) -> str:
    run(corpus, tmp_path / "data", *BYTE_FLAGS, "--append-eod")
    return str(tmp_path / "data_text_document")


def test_good_data_passes(prefix: str, tmp_path: Path):
    identity = read_manifest(tmp_path / "data.json").tokenizer.identity
    verify_for_training(prefix, identity, vocab_size=512)
    with pytest.raises(DataError, match=r"another tokenizer.*--allow-tokenizer-mismatch"):
        verify_for_training(prefix, "0" * 64)
    with pytest.raises(DataError, match=r"holds token id \d+"):
        verify_for_training(prefix, vocab_size=100)
    (tmp_path / "data.json").unlink()
    verify_for_training(prefix, "0" * 64)


@pytest.mark.parametrize("place", [0, 300, -1])
def test_ids_of_large_data_without_a_manifest(
    prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int
):
    """64 overlapping blocks, as in a file slightly over the limit."""
    monkeypatch.setattr("megatron_smlp.data.pairs.quick_check.WHOLE_BYTES", 1000)
    for module in ("content", "quick_check"):
        monkeypatch.setattr(f"megatron_smlp.data.pairs.{module}.BLOCK_BYTES", 1001)
    (tmp_path / "data.json").unlink()
    verify_for_training(prefix, vocab_size=512)
    tokens = np.memmap(prefix + ".bin", dtype=np.uint16, mode="r+")
    tokens[place] = 600
    tokens.flush()
    with pytest.raises(DataError, match=r"exceeds this run's vocabulary of 512 .* has id 600"):
        verify_for_training(prefix, vocab_size=512)


def test_a_moved_boundary_in_a_large_dataset_is_seen(
    run: Run, tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
):
    """Lengths and pointers agree, far from the ends that the quick fingerprint reads."""
    monkeypatch.setattr("megatron_smlp.data.pairs.quick_check.WHOLE_BYTES", 1000)
    monkeypatch.setattr("megatron_smlp.data.pairs.manifest.FINGERPRINT_BYTES", 64)
    run(corpus, tmp_path / "large", *BYTE_FLAGS)
    prefix = str(tmp_path / "large_text_document")
    index = open_index(prefix)
    lengths = index.lengths.copy()
    lengths[[150, 151]] += [1, -1]
    sequences = np.diff(index.documents).astype(np.int32)
    write_index(
        idx_path(prefix), dtype=index.dtype, lengths=lengths, sequences_per_document=sequences
    )
    with pytest.raises(DataError, match="does not match its manifest"):
        verify_for_training(prefix)
    assert any("SHA-256" in str(problem) for _, problem in validate(prefix))


def _pair(folder: Path, data: bytes) -> str:
    (folder / "x.idx").write_bytes(b"index")
    (folder / "x.bin").write_bytes(data)
    return str(folder / "x")


@pytest.mark.parametrize("at", [0, 499_999, 999_999])
def test_a_large_file_is_looked_at_in_many_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
):
    """Its ends and its middle: here 64 overlapping blocks of 20 kB."""
    monkeypatch.setattr(content, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(content, "BLOCK_BYTES", 20_000)
    data = bytearray(1_000_000)
    first = content_of(_pair(tmp_path, data))
    data[at] = 1
    assert content_of(_pair(tmp_path, data)) != first
