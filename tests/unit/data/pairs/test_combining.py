"""Merging and splitting, against Megatron's builder and against each other."""

import resource
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
import pytest
from data_helpers import BYTE_FLAGS, make_documents, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_smlp import durable
from megatron_smlp.data.pairs import writer as pair_writer
from megatron_smlp.data.pairs.combining import find_pairs, merge, scratch_folder
from megatron_smlp.data.pairs.full_check import validate
from megatron_smlp.data.pairs.indexed import open_index
from megatron_smlp.data.pairs.manifest import read_manifest
from megatron_smlp.data.pairs.splitting import NAMES, split
from megatron_smlp.data.prepare.preprocessing import Summary
from megatron_smlp.errors import DataError

Run = Callable[..., Summary]
NUMBERS = ["--tokenizer-type", "NullTokenizer", "--vocab-size"]


@pytest.fixture
def pairs(run: Run, tmp_path: Path) -> list[str]:
    """Three pairs of the same tokenizer."""
    for number in range(3):
        source = write_jsonl(tmp_path / f"{number}.jsonl", make_documents(50, seed=number))
        run(source, tmp_path / "in" / f"part{number}", *BYTE_FLAGS, "--append-eod")
    return [str(tmp_path / "in" / f"part{number}_text_document") for number in range(3)]


def _problems(prefix: str) -> list[str]:
    return [problem for _, problem in validate(prefix) if problem]


def test_merging_gives_the_bytes_of_megatron(pairs: list[str], tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for prefix in pairs:
        builder.add_index(prefix)
    builder.finalize(str(tmp_path / "theirs.idx"))
    folder = [str(tmp_path / "in")]
    merge(find_pairs(folder, output_prefix="x"), output_prefix=str(tmp_path / "ours"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (
            tmp_path / f"theirs{suffix}"
        ).read_bytes()
    assert _problems(str(tmp_path / "ours")) == []
    assert read_manifest(tmp_path / "ours.json").tokenizer.type == "ByteLevelTokenizer"


def test_more_pairs_than_files_may_be_open(pairs: list[str], tmp_path: Path) -> None:
    (tmp_path / "many").mkdir()
    for number in range(40):
        for suffix in (".bin", ".idx"):
            (tmp_path / "many" / f"{number}{suffix}").hardlink_to(pairs[0] + suffix)
    found = find_pairs([str(tmp_path / "many")], output_prefix="x")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_open = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (num_open + 20, before[1]))
    try:
        merge(found, output_prefix=str(tmp_path / "ours"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert open_index(str(tmp_path / "ours")).num_documents == 40 * 50


def test_a_pair_that_is_named_twice_is_merged_once(
    pairs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for half in (".bin", ".idx"):
        (tmp_path / f"link{half}").symlink_to(pairs[1] + half)
    names = [pairs[0], str(tmp_path / "in"), pairs[1] + ".bin", str(tmp_path / "link")]
    assert find_pairs(names, output_prefix="x") == pairs
    assert capsys.readouterr().err.splitlines() == [
        f"note: {again} is {first} again: merged once"
        for again, first in ((pairs[0], pairs[0]), (pairs[1], pairs[1]), (names[3], pairs[1]))
    ]


def test_two_at_work_on_one_output_are_refused(pairs: list[str], tmp_path: Path) -> None:
    output = str(tmp_path / "ours")
    with scratch_folder(output) as folder:
        (folder / "begun").touch()
        with pytest.raises(DataError, match=r"another process is writing .*ours'.*merging/lock"):
            merge(pairs, output_prefix=output)
        assert (folder / "begun").exists()
    merge(pairs, output_prefix=output)
    assert _problems(output) == []
    assert not list(tmp_path.glob("*.merging"))


def test_a_lock_that_was_removed_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One process opens the lock of another, which ends before it is locked."""
    folder, opened = tmp_path / "folder", []
    first = durable.lock_folder(folder)
    lock_if_possible = durable.lock_if_possible

    def late(file: IO[bytes], operation: int) -> None:
        opened.append(file)
        if len(opened) == 1:
            durable.remove_locked(folder, first)
        lock_if_possible(file, operation)

    monkeypatch.setattr(durable, "lock_if_possible", late)
    second = durable.lock_folder(folder)
    assert len(opened) == 2
    with pytest.raises(BlockingIOError):
        durable.lock_folder(folder)
    durable.remove_locked(folder, second)
    assert not folder.exists()


def test_what_a_killed_merge_left_is_removed(pairs: list[str], tmp_path: Path) -> None:
    left = tmp_path / "ours.merging"
    left.mkdir()
    (left / "ours.bin").write_bytes(b"half")
    merge(pairs, output_prefix=str(tmp_path / "ours"))
    assert _problems(str(tmp_path / "ours")) == []
    assert not left.exists()


def test_narrow_and_wide_ids_merge_into_wide_ones(run: Run, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["1 2 3", "4"])
    run(source, tmp_path / "narrow", *NUMBERS, 100)
    run(source, tmp_path / "wide", *NUMBERS, 70000)
    inputs = [str(tmp_path / f"{name}_text_document") for name in ("narrow", "wide")]
    with pytest.raises(DataError, match="not written with the same tokenizer"):
        merge(inputs, output_prefix=str(tmp_path / "both"))
    merge(inputs, output_prefix=str(tmp_path / "both"), allow_mismatch=True)
    both = open_index(str(tmp_path / "both"))
    assert both.dtype == np.int32
    assert both.tokens.tolist() == [1, 2, 3, 4] * 2
    assert not (tmp_path / "both.json").exists()


def test_one_vocabulary_read_by_two_types_merges(
    run: Run, tmp_path: Path, tokenizer_folder: Path, gpt2_files: tuple[Path, Path]
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", make_documents(5))
    vocab, merges = gpt2_files
    gpt2 = ["--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", vocab, "--merge-file", merges]
    folder = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer_folder]
    run(source, tmp_path / "one", *gpt2)
    run(source, tmp_path / "two", *folder)
    inputs = [str(tmp_path / f"{name}_text_document") for name in ("one", "two")]
    merge(inputs, output_prefix=str(tmp_path / "both"))
    assert read_manifest(tmp_path / "both.json").pairs["both"].documents == 10


def test_what_cannot_be_merged(pairs: list[str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is one of the inputs"):
        find_pairs(pairs, output_prefix=pairs[0])
    Path(pairs[1] + ".idx").unlink()
    with pytest.raises(DataError, match=r"part1_text_document\.idx is missing"):
        find_pairs([str(tmp_path / "in")], output_prefix="x")
    with pytest.raises(DataError, match=r"holds no \.bin/\.idx pair"):
        find_pairs([str(tmp_path)], output_prefix="x")


def test_a_pair_beside_the_cache_of_its_training(pairs: list[str], tmp_path: Path) -> None:
    Path(pairs[0], "cache").mkdir(parents=True)
    assert find_pairs(pairs, output_prefix=str(tmp_path / "out")) == pairs


def test_a_damaged_pair_is_not_merged(pairs: list[str], tmp_path: Path) -> None:
    data = bytearray(Path(pairs[1] + ".bin").read_bytes())
    data[5] ^= 1
    Path(pairs[1] + ".bin").write_bytes(data)
    with pytest.raises(DataError, match="is not what its manifest"):
        merge(pairs, output_prefix=str(tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))


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
) -> None:
    whole, output = open_index(pairs[0]), str(tmp_path / "split")
    documents = [whole.document(number).tobytes() for number in range(whole.num_documents)]
    for left in tmp_path.glob("split_*"):  # of the example before
        left.unlink()
    try:
        parts = split(pairs[0], output_prefix=output, weights=weights, by=by, seed=seed)
    except DataError as error:
        assert "would get no document" in str(error)  # noqa: PT017
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


def test_shares_are_kept(pairs: list[str], tmp_path: Path) -> None:
    output = str(tmp_path / "split")
    assert split(pairs[0], output_prefix=output, weights=[6, 3, 1], by="documents") == {
        "train": 30,
        "valid": 15,
        "test": 5,
    }
    split(pairs[0], output_prefix=output, weights=[6, 3, 1], by="tokens", seed=1)
    tokens = np.array([open_index(f"{output}_{name}").num_tokens for name in NAMES])
    np.testing.assert_allclose(tokens / tokens.sum(), [0.6, 0.3, 0.1], atol=0.05)


@pytest.mark.parametrize("names", range(4))
def test_a_split_that_dies_leaves_no_part_beside_one_of_another_split(
    pairs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: int
) -> None:
    """A document of an older valid part may be in the new train part."""
    output, weights = str(tmp_path / "split"), [1.0, 1.0]
    split(pairs[0], output_prefix=output, weights=weights, by="documents", seed=1)
    old = [Path(f"{output}_{name}.idx").read_bytes() for name in NAMES[:2]]
    left = [names]
    original = pair_writer.link_durably

    def link_durably(first: Path, target: Path) -> None:
        if not left[0]:
            raise OSError("no room")
        left[0] -= 1
        original(first, target)

    monkeypatch.setattr(pair_writer, "link_durably", link_durably)
    with pytest.raises(OSError, match="no room"):
        split(pairs[0], output_prefix=output, weights=weights, by="documents", seed=2)
    for name, before in zip(NAMES, old, strict=False):
        path = Path(f"{output}_{name}.idx")
        assert not path.exists() or path.read_bytes() != before
    assert not (tmp_path / "split_valid.json").exists()


def test_a_split_that_dies_while_it_writes_leaves_the_older_one(
    pairs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, weights = str(tmp_path / "split"), [1.0, 1.0]
    split(pairs[0], output_prefix=output, weights=weights, by="documents", seed=1)
    before = {path: path.read_bytes() for path in tmp_path.glob("split_*")}
    original = pair_writer.PairWriter.finish

    def finish(writer: pair_writer.PairWriter, **record: str) -> object:
        if writer.stem.name == "valid":
            raise OSError("no room")
        return original(writer, **record)

    monkeypatch.setattr(pair_writer.PairWriter, "finish", finish)
    with pytest.raises(OSError, match="no room"):
        split(pairs[0], output_prefix=output, weights=weights, by="documents", seed=2)
    assert {path: path.read_bytes() for path in tmp_path.glob("split_*")} == before


@pytest.mark.parametrize("weights", [[3, 1], [1, 0, 1], [0, 1]])
def test_empty_documents_at_the_end_make_no_part_of_their_own(
    tmp_path: Path, weights: list[float]
) -> None:
    writer = pair_writer.PairWriter(tmp_path / "all", dtype=np.dtype("uint16"))
    sizes = np.ones(4, np.int32)
    writer.write(np.arange(4), lengths=sizes, sequences=np.array([1, 1, 1, 1, 0]))
    writer.finish(key="text", level="document")
    parts = split(
        str(tmp_path / "all"), output_prefix=str(tmp_path / "s"), weights=weights, by="tokens"
    )
    assert sum(parts.values()) == 5
    for name, weight in zip(NAMES, [*weights, 0], strict=False):
        assert (parts[name] > 0) == (weight > 0) == (tmp_path / f"s_{name}.idx").exists()


@pytest.mark.parametrize("weights", [[], [0, 0], [1, -1], [1, 1, 1, 1]])
def test_bad_shares(pairs: list[str], tmp_path: Path, weights: list[float]) -> None:
    with pytest.raises(DataError, match="--weights"):
        split(pairs[0], output_prefix=str(tmp_path / "s"), weights=weights, by="tokens")
