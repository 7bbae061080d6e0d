"""Merging is compared with Megatron's builder, and splitting with what was split."""

import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import BYTE_FLAGS, Run, assert_same_pair, make_documents, write_pair
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_smlp.data.pairs import writer as pair_writer
from megatron_smlp.data.pairs.combining import find_pairs, merge
from megatron_smlp.data.pairs.full_check import validate
from megatron_smlp.data.pairs.indexed import open_index
from megatron_smlp.data.pairs.manifest import read_manifest
from megatron_smlp.data.pairs.splitting import NAMES, split
from megatron_smlp.errors import DataError

NUMBERS = ["--tokenizer-type", "NullTokenizer", "--vocab-size"]


@pytest.fixture
def pairs(run: Run, tmp_path: Path) -> list[str]:
    (tmp_path / "in").mkdir()
    flags = [*BYTE_FLAGS, "--append-eod"]
    return [
        write_pair(run, tmp_path / "in", f"part{n}", make_documents(50, n), flags) for n in range(3)
    ]


def _problems(prefix: str) -> list[str]:
    return [problem for _, problem in validate(prefix) if problem]


def test_merging_gives_the_bytes_of_megatron(pairs: list[str], tmp_path: Path):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for prefix in pairs:
        builder.add_index(prefix)
    builder.finalize(str(tmp_path / "theirs.idx"))
    folder = [str(tmp_path / "in")]
    merge(find_pairs(folder, output_prefix="x"), output_prefix=str(tmp_path / "ours"))
    assert_same_pair(tmp_path / "ours", tmp_path / "theirs")
    assert _problems(str(tmp_path / "ours")) == []
    assert read_manifest(tmp_path / "ours.json").tokenizer.type == "ByteLevelTokenizer"


def test_more_pairs_than_files_may_be_open(pairs: list[str], tmp_path: Path):
    (tmp_path / "many").mkdir()
    for number in range(40):
        for suffix in (".bin", ".idx"):
            (tmp_path / "many" / f"{number}{suffix}").hardlink_to(pairs[0] + suffix)
    found = find_pairs([str(tmp_path / "many")], output_prefix="x")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_open = len(list(Path("/dev/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (num_open + 20, before[1]))
    try:
        merge(found, output_prefix=str(tmp_path / "ours"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert open_index(str(tmp_path / "ours")).num_documents == 40 * 50


def test_narrow_and_wide_ids_merge_into_wide_ones(run: Run, tmp_path: Path):
    inputs = [
        write_pair(run, tmp_path, str(size), ["1 2 3", "4"], [*NUMBERS, size])
        for size in (100, 70_000)
    ]
    both = r"\(NullTokenizer, 70000 entries, .*; against NullTokenizer, 100 entries, .*\); prep"
    with pytest.raises(DataError, match=f"not written with the same tokenizer settings {both}"):
        merge(inputs, output_prefix=str(tmp_path / "both"))
    merge(inputs, output_prefix=str(tmp_path / "both"), allow_mismatch=True)
    both = open_index(str(tmp_path / "both"))
    assert both.dtype == np.int32
    assert both.tokens.tolist() == [1, 2, 3, 4] * 2
    assert not (tmp_path / "both.json").exists()


def test_what_cannot_be_merged(pairs: list[str], tmp_path: Path):
    with pytest.raises(DataError, match="is one of the inputs"):
        find_pairs(pairs, output_prefix=pairs[0])
    Path(pairs[1] + ".idx").unlink()
    with pytest.raises(DataError, match=r"part1_text_document\.idx does not exist"):
        merge(find_pairs([str(tmp_path / "in")], output_prefix="x"), output_prefix="x")
    with pytest.raises(DataError, match=r"holds no \.bin/\.idx pair"):
        find_pairs([str(tmp_path)], output_prefix="x")


def test_a_pair_beside_the_cache_of_its_training(pairs: list[str], tmp_path: Path):
    Path(pairs[0], "cache").mkdir(parents=True)
    assert find_pairs(pairs, output_prefix=str(tmp_path / "out")) == pairs


def test_a_pair_that_is_named_twice_is_merged_once(pairs: list[str], tmp_path: Path):
    for half in (".bin", ".idx"):
        (tmp_path / f"link{half}").symlink_to(pairs[1] + half)
    names = [pairs[0], str(tmp_path / "in"), pairs[1] + ".bin", str(tmp_path / "link")]
    assert find_pairs(names, output_prefix="x") == pairs


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    weights=st.lists(st.integers(1, 50), min_size=1, max_size=3),
    by=st.sampled_from(["documents", "tokens"]),
    seed=st.none() | st.integers(0, 5),
)
def test_every_document_is_in_one_part(
    pairs: list[str], tmp_path: Path, weights: list[int], by: str, seed: int | None
):
    whole, output = open_index(pairs[0]), str(tmp_path / "split")
    documents = [whole.document(number).tobytes() for number in range(whole.num_documents)]
    for left in tmp_path.glob("split_*"):  # from the previous example
        left.unlink()
    try:
        parts = split(pairs[0], output_prefix=output, weights=weights, by=by, seed=seed)
    except DataError as error:
        assert "gets none of" in str(error)  # noqa: PT017
        return
    found = []
    for name, count in parts.items():
        if count:
            index = open_index(f"{output}_{name}")
            assert index.num_documents == count
            assert _problems(f"{output}_{name}") == []
            found += [index.document(number).tobytes() for number in range(count)]
    assert (found if seed is None else sorted(found)) == (
        documents if seed is None else sorted(documents)
    )


def test_shares_are_kept(pairs: list[str], tmp_path: Path):
    output = str(tmp_path / "split")
    parts = split(pairs[0], output_prefix=output, weights=[6, 3, 1], by="documents")
    assert parts == {"train": 30, "valid": 15, "test": 5}
    split(pairs[0], output_prefix=output, weights=[6, 3, 1], by="tokens", seed=1)
    tokens = np.array([open_index(f"{output}_{name}").num_tokens for name in NAMES])
    np.testing.assert_allclose(tokens / tokens.sum(), [0.6, 0.3, 0.1], atol=0.05)


def test_a_split_beside_the_manifest_of_what_is_split(run: Run, tmp_path: Path):
    prefix, output = write_pair(run, tmp_path, "books", make_documents(50)), f"{tmp_path}/books"
    before = (tmp_path / "books.json").read_bytes()
    split(prefix, output_prefix=output, weights=[1, 1], by="documents")
    assert (tmp_path / "books.json").read_bytes() == before
    assert {*read_manifest(tmp_path / "books_train.json").pairs} == {"books_train"}


def test_a_pair_that_is_not_what_its_manifest_describes(pairs: list[str], tmp_path: Path):
    """The parts' manifest would match them, but might name the wrong tokenizer."""
    for half in (".bin", ".idx"):
        shutil.copyfile(pairs[1] + half, pairs[0] + half)
    output = str(tmp_path / "out")
    with pytest.raises(DataError, match="does not match its manifest"):
        merge(pairs, output_prefix=output)
    with pytest.raises(DataError, match="does not match its manifest"):
        split(pairs[0], output_prefix=output, weights=[1, 1], by="documents")


@pytest.mark.parametrize("names", [None, *range(4)])
def test_a_split_that_dies_leaves_no_part_beside_one_of_another_split(
    pairs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: int | None
):
    """A document of an old valid part may be in the new train part. None: it dies while writing."""
    output = f"{tmp_path}/split"
    cut: dict[str, Any] = {"output_prefix": output, "weights": [1, 1], "by": "documents"}
    split(pairs[0], **cut, seed=1)
    old = {path: path.read_bytes() for path in tmp_path.glob("split_*")}
    originals = pair_writer.link_durably, pair_writer.PairWriter.finish
    linked = []

    def link_durably(first: Path, target: Path) -> None:
        linked.append(target)
        if len(linked) > (names or 0):
            raise OSError("no room")
        originals[0](first, target)

    def finish(writer: pair_writer.PairWriter, **record: str) -> object:
        if names is None and writer.stem.name == "valid":
            raise OSError("no room")
        return originals[1](writer, **record)

    monkeypatch.setattr(pair_writer, "link_durably", link_durably)
    monkeypatch.setattr(pair_writer.PairWriter, "finish", finish)
    with pytest.raises(OSError, match="no room"):
        split(pairs[0], **cut, seed=2)
    same = {path for path, before in old.items() if path.exists() and path.read_bytes() == before}
    kept = {path for path in old if path.suffix == ".idx" or path.name == "split_valid.json"}
    assert same == {*old} if names is None else not same & kept
