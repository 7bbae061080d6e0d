"""Training refuses data that it must not read, and says why."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_helpers import BYTE_FLAGS

from megatron_smlp.data.pairs.content import content_of
from megatron_smlp.data.pairs.full_check import validate
from megatron_smlp.data.pairs.indexed import idx_path, open_index, write_index
from megatron_smlp.data.pairs.manifest import read_manifest
from megatron_smlp.data.pairs.quick_check import verify_for_training
from megatron_smlp.data.prepare.preprocessing import Summary
from megatron_smlp.errors import DataError


@pytest.fixture
def prefix(run: Callable[..., Summary], tmp_path: Path, corpus: Path) -> str:
    run(corpus, tmp_path / "data", *BYTE_FLAGS, "--append-eod")
    return str(tmp_path / "data_text_document")


def test_good_data_passes(prefix: str, tmp_path: Path) -> None:
    identity = read_manifest(tmp_path / "data.json").tokenizer.identity
    verify_for_training(prefix, identity, vocab_size=512)


def test_data_without_a_manifest_passes(prefix: str, tmp_path: Path) -> None:
    (tmp_path / "data.json").unlink()
    verify_for_training(prefix, "0" * 64)


def test_another_tokenizer_is_refused_with_the_way_around(prefix: str) -> None:
    with pytest.raises(DataError, match=r"another tokenizer.*--allow-tokenizer-mismatch"):
        verify_for_training(prefix, "0" * 64)


def test_ids_beyond_the_vocabulary_are_refused(prefix: str) -> None:
    with pytest.raises(DataError, match=r"holds token id \d+.*0 to 99"):
        verify_for_training(prefix, vocab_size=100)


@pytest.mark.parametrize("place", [0, 300, -1])
def test_ids_of_large_data_without_a_manifest(
    prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    """64 blocks that overlap, as in a file a little over the limit."""
    monkeypatch.setattr("megatron_smlp.data.pairs.quick_check.WHOLE_BYTES", 1000)
    for module in ("content", "quick_check"):
        monkeypatch.setattr(f"megatron_smlp.data.pairs.{module}.BLOCK_BYTES", 1001)
    (tmp_path / "data.json").unlink()
    verify_for_training(prefix, vocab_size=512)
    tokens = np.memmap(prefix + ".bin", dtype=np.uint16, mode="r+")
    tokens[place] = 600
    tokens.flush()
    with pytest.raises(DataError, match=r"not for this run's vocabulary of 512 .* has id 600"):
        verify_for_training(prefix, vocab_size=512)


def test_a_file_is_hashed_once(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    verify_for_training(prefix)
    monkeypatch.setattr("megatron_smlp.data.pairs.content.sha256_of", None)
    verify_for_training(prefix)
    content_of(prefix)


def test_a_missing_prefix_names_what_is_there(prefix: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no dataset at .*data_text_document"):
        verify_for_training(str(tmp_path / "dato"))


def test_a_missing_index_is_said(prefix: str) -> None:
    Path(prefix + ".idx").unlink()
    with pytest.raises(DataError, match=r"\.idx is missing beside its \.bin"):
        verify_for_training(prefix)


def _flip(path: str, at: int) -> None:
    data = bytearray(Path(path).read_bytes())
    data[at] ^= 0x55
    Path(path).write_bytes(data)


@pytest.mark.parametrize("at", [0, 8, 9, 16, 17, 18, 25, 26, 33, 34, 40, -1, -8, -9])
@pytest.mark.parametrize("with_manifest", [True, False])
def test_a_flipped_byte_in_the_index(
    prefix: str, tmp_path: Path, at: int, with_manifest: bool
) -> None:
    _flip(prefix + ".idx", at)
    if not with_manifest:
        (tmp_path / "data.json").unlink()
    with pytest.raises(DataError, match=r"\.idx|index|manifest"):
        verify_for_training(prefix)


@pytest.mark.parametrize("at", [0, 1000, -1])
def test_a_flipped_token_is_seen_by_the_manifest(prefix: str, at: int) -> None:
    _flip(prefix + ".bin", at)
    with pytest.raises(DataError, match="is not what its manifest"):
        verify_for_training(prefix)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("keep", [0, 1, 20, 33, 34, 100])
def test_a_truncated_file(prefix: str, suffix: str, keep: int) -> None:
    path = Path(prefix + suffix)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"truncated|damaged|describes"):
        verify_for_training(prefix)


def test_a_moved_boundary_in_a_large_dataset_is_seen(
    run: Callable[..., Summary], tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lengths and pointers that agree, far from the ends that the quick fingerprint reads."""
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
    with pytest.raises(DataError, match="is not what its manifest"):
        verify_for_training(prefix)
    assert any("SHA-256" in str(finding.problem) for finding in validate(prefix))


def test_swapped_files_are_seen(prefix: str, tmp_path: Path) -> None:
    Path(prefix + ".bin").rename(tmp_path / "x")
    Path(prefix + ".idx").rename(prefix + ".bin")
    (tmp_path / "x").rename(prefix + ".idx")
    with pytest.raises(DataError, match="is not a Megatron index"):
        verify_for_training(prefix)


def test_a_damaged_manifest_is_said(prefix: str, tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    body = json.loads(path.read_text())
    del body["pairs"]["data_text_document"]["tokens"]
    path.write_text(json.dumps(body))
    with pytest.raises(DataError, match="not a readable dataset manifest"):
        verify_for_training(prefix)
