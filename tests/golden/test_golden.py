"""Resolved flags, dry runs, and files of earlier versions stay as they are.

A difference in namespaces.json or dry_runs.txt that is meant is written by behaviour.py; one in
what is read of written_by_*/ is a user's checkpoint or dataset that can no longer be read.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import artifacts  # noqa: E402
import behaviour  # noqa: E402

WRITTEN = sorted(HERE.glob("written_by_*"))

versions = pytest.mark.parametrize("written", WRITTEN, ids=lambda folder: folder.name)


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore the environment that `behaviour` changes."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "CUDA_DEVICE_MAX_CONNECTIONS"):
        monkeypatch.setenv(name, "1" if name != "RANK" else "0")
        monkeypatch.delenv(name)


def test_flags_resolve_as_before():
    expected = json.loads(behaviour.NAMESPACES.read_text(encoding="utf-8"))
    found = behaviour.namespaces()
    assert found.keys() == expected.keys()
    for name, values in found.items():
        assert values == expected[name], name


def test_dry_runs_print_as_before():
    assert behaviour.dry_runs() == behaviour.DRY_RUNS.read_text(encoding="utf-8")


@versions
def test_a_dataset_is_written_and_read_as_before(written: Path, tmp_path: Path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    ours = artifacts.preprocess(tmp_path)
    theirs = written / ours.name
    for suffix in (".bin", ".idx"):
        assert ours.with_suffix(suffix).read_bytes() == theirs.with_suffix(suffix).read_bytes()
    documents = IndexedDataset(str(theirs))
    assert len(documents) == len(artifacts.TEXT)
    words = [[int(word) for word in record["text"].split()] for record in artifacts.TEXT]
    assert [document[:-1].tolist() for document in documents] == words


@versions
def test_a_checkpoint_goes_on_as_before(written: Path, tmp_path: Path):
    shutil.copytree(written, tmp_path / "written")  # Megatron writes its cache beside the data
    data, run = tmp_path / "written" / "data_text_document", tmp_path / "written" / "run"
    flags = f"--train-iters {artifacts.END} --load {run}"
    losses = artifacts.train(flags, data=data, log=tmp_path / "log")
    expected = json.loads((written / "losses.json").read_text(encoding="utf-8"))
    assert losses == pytest.approx(expected, rel=1e-4)  # other CPUs add in another order


@versions
def test_a_checkpoint_and_an_exported_model_are_one_another(written: Path, tmp_path: Path):
    """Each way, bit by bit."""
    expected = load_file(written / "hf" / "model.safetensors")
    artifacts.convert(written / "run", tmp_path / "hf", "hf")
    _assert_same(load_file(tmp_path / "hf" / "model.safetensors"), expected)
    back = ["--load", str(written / "hf"), "--save", str(tmp_path / "back")]
    _convert([*back, "--from", "hf", "--to", "torch_dist"])
    artifacts.convert(tmp_path / "back", tmp_path / "again", "hf")
    _assert_same(load_file(tmp_path / "again" / "model.safetensors"), expected)


def _convert(words: list[str]) -> None:
    from megatron_smlp.conversion.cli import main

    main(words)


def _assert_same(ours: dict, expected: dict) -> None:
    assert ours.keys() == expected.keys()
    for name, tensor in ours.items():
        assert tensor.equal(expected[name]), name
