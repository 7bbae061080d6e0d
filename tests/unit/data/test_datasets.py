"""Building Megatron's datasets: weights kept, uses counted, caches safe."""

import multiprocessing
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import (
    BYTE_FLAGS,
    LENGTH,
    Run,
    dataset_config,
    make_documents,
    small_files,
    write_pair,
)
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from torch.utils.data import DataLoader

from megatron_smlp.data import datasets
from megatron_smlp.data.blending import Blends, parse_blend
from megatron_smlp.data.datasets import (
    UnhurriedBuilder,
    build_datasets,
    dataset_uses,
    use_lines,
)
from megatron_smlp.data.index_cache import exclusive_caches, remove_unfinished
from megatron_smlp.data.pairs.content import ChangedDataError
from megatron_smlp.data.pairs.indexed import open_index
from megatron_smlp.errors import DataError, UnlikeRanksError
from megatron_smlp.platform.one_process import one_process


@pytest.fixture
def prefixes(run: Run, tmp_path: Path) -> list[str]:
    return [
        write_pair(
            run, tmp_path, f"data{n}", make_documents(count, n), [*BYTE_FLAGS, "--append-eod"]
        )
        for n, count in enumerate((100, 300, 60))
    ]


def _build(blend: list[str], sizes: list[int], cache: Path, split: str = "900,50,50") -> Any:
    return _build_blends(Blends(parse_blend(blend, source="--data-path")), sizes, cache, split)


def _build_blends(blends: Blends, sizes: list[Any], cache: Path, *more: str) -> Any:
    config = dataset_config(blends, cache, *more)
    return build_datasets(sizes, config=config, is_built_on_rank=lambda: True, rank=0)


def test_weights_are_honoured_within_one_sample_in_a_thousand(prefixes: list[str], tmp_path: Path):
    shares = [0.7, 0.2, 0.1]
    blend = [str(part) for pair in zip(shares, prefixes, strict=True) for part in pair]
    built = _build(blend, [5000, 10, 10], tmp_path / "cache")
    uses = [use for use in dataset_uses(built, sequence_length=LENGTH) if use.split == "train"]
    drawn = np.array([use.samples for use in uses])
    assert np.abs(drawn - np.array(shares) * drawn.sum()).max() <= drawn.sum() / 1000
    assert drawn.sum() >= 5000


def test_uses_of_one_dataset(prefixes: list[str], tmp_path: Path):
    whole = open_index(prefixes[1]).num_tokens
    built = _build([prefixes[1]], [2 * whole // LENGTH, 5, 5], tmp_path / "cache")
    uses = dataset_uses(built, sequence_length=LENGTH)
    assert [use.split for use in uses] == ["train", "valid", "test"]
    assert sum(use.tokens for use in uses) == whole
    assert uses[0].epochs == pytest.approx(2 * whole / uses[0].tokens, rel=0.01)
    assert prefixes[1] in use_lines(uses)[1]


def test_a_split_without_documents_is_refused_where_megatron_would_hang(
    prefixes: list[str], tmp_path: Path
):
    with pytest.raises(DataError, match=r"--split 969,30,1 leaves no token for test.*has 60"):
        _build([prefixes[2]], [10, 10, 0], tmp_path / "cache", split="969,30,1")


def test_a_split_of_empty_sequences_is_refused_where_megatron_would_hang(tmp_path: Path):
    builder = IndexedDatasetBuilder(f"{tmp_path / 'a'}.bin")
    for count in [LENGTH] * 50 + [0] * 50:
        builder.add_document(torch.ones(count, dtype=torch.int32), [count])
    builder.finalize(f"{tmp_path / 'a'}.idx")
    with pytest.raises(DataError, match=r"--split 900,50,50 leaves no token for valid"):
        _build([str(tmp_path / "a")], [10, 10, 10], tmp_path / "cache")


def test_machines_with_paths_of_their_own_share_a_cache(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cache, text = tmp_path / "cache", make_documents(100, 1)
    names = []
    for machine in ("node0", "node1"):
        (tmp_path / machine).mkdir()
        names.append(write_pair(run, tmp_path / machine, "data", text))
    made = []
    for name in names:
        config = dataset_config(Blends(parse_blend([name], source="--data-path")), cache)
        # That of GPT-2's two files is a temporary folder of each process.
        config.tokenizer.unique_identifiers["tokenizer_path"] = f"{name}/tokenizer"
        first, *_ = build_datasets([50, 5, 5], config=config, is_built_on_rank=lambda: True, rank=0)
        made.append((sorted(cache.rglob("*.npy")), first[7]["tokens"].tolist()))
    assert made[0][0]
    assert made[0] == made[1]
    monkeypatch.setattr(datasets, "first_rank_first", lambda *_, **__: nullcontext())
    blends = Blends(parse_blend(names[:1], source="--data-path"))
    config = dataset_config(blends, tmp_path / "another")
    monkeypatch.setattr(UnhurriedBuilder, "build", lambda _: np.load(tmp_path / "absent.npy"))
    with pytest.raises(UnlikeRanksError, match="is not there for rank 1: give --data-cache-path"):
        build_datasets([50, 5, 5], config=config, is_built_on_rank=lambda: True, rank=1)


@pytest.mark.parametrize("flags", ["--split", "--valid-data-path"])
def test_a_dataset_without_weights_that_is_shorter_than_a_sample(
    run: Run, prefixes: list[str], tmp_path: Path, flags: str
):
    """With weights it is read repeatedly."""
    short = write_pair(run, tmp_path, "short", ["a" * LENGTH] * (10 if flags == "--split" else 1))

    def build(blend: list[str]) -> None:
        if flags == "--split":
            _build(blend, [100, 2, 0], tmp_path / "cache", split="900,100,0")
        else:
            train, valid = (parse_blend(part, source="x") for part in (prefixes[:1], blend))
            _build_blends(Blends(per_split=[train, valid, None]), [100, 2, 0], tmp_path / "cache")

    with pytest.raises(DataError, match=r"short_text_document' has 32 tokens for valid, but a sam"):
        build([prefixes[0], short])
    build(["1", prefixes[0], "1", short])


def test_a_whole_validation_of_less_than_a_sample(run: Run, prefixes: list[str], tmp_path: Path):
    short = write_pair(run, tmp_path, "short", ["a" * LENGTH])
    train, valid = (parse_blend([name], source="x") for name in (prefixes[0], short))
    blends = Blends(per_split=[train, valid, None])
    with pytest.raises(DataError, match=r"short_text_document' has 32 tokens .* --full-validation"):
        _build_blends(blends, [100, None, 0], tmp_path / "cache")
    assert len(_build_blends(blends, [100, 2, 0], tmp_path / "cache")[1]) >= 2


def test_datasets_without_weights_that_do_not_suffice(prefixes: list[str], tmp_path: Path):
    _build(prefixes, [500, 5, 5], tmp_path / "cache")
    with pytest.raises(DataError, match=r"read once without weights.*needs 100000.*by size: \d+ "):
        _build(prefixes, [100_000, 5, 5], tmp_path / "cache")


def _all_samples(blend: list[str], cache: Path) -> list[bytes]:
    train = _build(blend, [400, 5, 5], cache)[0]
    return [train[number]["tokens"].numpy().tobytes() for number in range(len(train))]


def test_caches_cut_short_by_a_crash_are_built_again(prefixes: list[str], tmp_path: Path):
    cache, blend = tmp_path / "cache", ["0.5", prefixes[0], "0.5", prefixes[1]]
    expected = _all_samples(blend, cache)
    files = sorted(cache.glob("*.npy"))
    assert len(files) > 6
    for number, path in enumerate(files):
        body = path.read_bytes()
        path.write_bytes(body[: (0, 20, len(body) - 1)[number % 3]])
    assert _all_samples(blend, cache) == expected
    assert remove_unfinished(cache) == []


def test_only_unfinished_indices_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Neither the user's own files in the folder nor files that are unreadable for a moment."""
    np.save(tmp_path / "labels.npy", np.array([{"a": 1}], dtype=object))
    kept = tmp_path / "0-WatchedGPTDataset-train-shuffle_index.npy"
    np.save(kept, np.arange(9))
    cut = tmp_path / "0-BlendedDataset-train-dataset_index.npy"
    cut.write_bytes(kept.read_bytes()[:-1])
    assert remove_unfinished(tmp_path) == [cut]

    def unreadable(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr(np, "load", unreadable)
    assert remove_unfinished(tmp_path) == []
    assert kept.exists()


def test_a_dataset_that_grew_is_read_through_an_index_of_its_own(run: Run, tmp_path: Path):
    samples = []
    for cache, count in (("cache", 141), ("cache", 284), ("fresh", 284)):
        prefix = write_pair(run, tmp_path, "data", make_documents(count))
        samples.append(_all_samples([prefix], tmp_path / cache))
    before, after, fresh = samples
    assert after == fresh != before


@pytest.mark.parametrize(
    ("damage", "what", "workers"),
    [
        ("cut", "content differs from the start", 0),
        ("blank", "content differs from the start", 1),
        ("remove", "No such", 0),
    ],
)
def test_a_pair_that_changes_while_it_is_read(
    prefixes: list[str], tmp_path: Path, damage: str, what: str, workers: int
):
    """A one-line error, also from a data loader worker, in place of SIGBUS or zeros."""
    prefix = prefixes[0]
    train = _build([prefix], [400, 5, 5], tmp_path / "cache")[0]
    batches = iter(DataLoader(train, num_workers=workers, prefetch_factor=1 if workers else None))
    next(batches)
    for suffix in (".bin", ".idx"):  # a copy with the same bytes is not a change
        shutil.copyfile(prefix + suffix, tmp_path / "copy")
        (tmp_path / "copy").rename(prefix + suffix)
    next(batches)
    if damage == "remove":
        Path(f"{prefix}.idx").unlink()
    else:
        size = Path(f"{prefix}.bin").stat().st_size
        os.truncate(f"{prefix}.bin", 1000)
        os.truncate(f"{prefix}.bin", 1000 if damage == "cut" else size)  # fills its end with zeros
    with pytest.raises(ChangedDataError) as error:
        list(batches)
    text = str(error.value)
    assert text.startswith(f"the dataset {prefix!r} changed while this run was reading it")
    assert what in text
    assert "Traceback" not in text


def _build_in_a_process(blend: list[str], cache: Path, results: Any) -> None:
    results.put(_all_samples(blend, cache))


def test_two_jobs_that_start_at_once(prefixes: list[str], tmp_path: Path):
    blend = ["0.5", prefixes[0], "0.5", prefixes[1]]
    # Forked: Megatron is already imported, so that both reach the cache at the same time.
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    arguments = (blend, tmp_path / "cache", results)
    jobs = [context.Process(target=_build_in_a_process, args=arguments) for _ in range(2)]
    for job in jobs:
        job.start()
    both = [results.get(timeout=60) for _ in jobs]
    for job in jobs:
        job.join()
    assert both[0] == both[1] == _all_samples(blend, tmp_path / "alone")


def test_a_cache_that_cannot_be_written(tmp_path: Path):
    blocked = tmp_path / "file"
    blocked.touch()
    with (
        pytest.raises(DataError, match=r"cannot be cached in .* --data-cache-path"),
        exclusive_caches([blocked / "cache"]),
    ):
        pass


def test_a_disk_without_room_for_an_index(prefixes: list[str], tmp_path: Path):
    """Megatron raises a bare Exception on the first rank."""
    message = r"cannot be cached in .*cache \(File too large\); give another folder with --data-c"
    with one_process(), small_files(100), pytest.raises(DataError, match=message):
        _build([prefixes[0]], [100, 5, 5], tmp_path / "cache")
