"""A checkpoint that would run code on loading is refused, wherever the code hides."""

import inspect
import os
import pickle
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support import exploits
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException

from megatron_smlp.checkpoints.safe_unpickling import load_metadata
from megatron_smlp.errors import DamagedCheckpointError, UnsafeCheckpointError
from megatron_smlp.megatron_patches import safe_loading


@pytest.fixture(scope="module", autouse=True)
def applied() -> None:
    safe_loading.apply()


def test_who_looks_up_what_is_replaced():
    """torch loads objects through its planner, and Megatron what all ranks share by load_common."""
    from megatron.core.dist_checkpointing import serialization

    assert "planner.load_bytes(" in inspect.getsource(FileSystemReader.read_data.__wrapped__)
    assert callable(DefaultLoadPlanner.load_bytes)
    assert "load_common(" in inspect.getsource(serialization.load_common_state_dict)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    state = {"weight": torch.arange(6.0), "object": {"step": 3, "name": "Adam"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, storage_writer=FileSystemWriter(str(folder)), no_dist=True)
    return folder


def load(folder: Path) -> dict[str, object]:
    """Load as torch does, the index first, and unwrap the error that torch wraps."""
    box: dict[str, object] = {"weight": torch.zeros(6), "object": {"step": 0, "name": ""}}
    reader = FileSystemReader(str(folder))
    reader.read_metadata()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            dcp.load(box, storage_reader=reader, no_dist=True)
        except CheckpointException as error:
            raise next(failure[0] for failure in error.failures.values()) from error
    return box


def test_what_is_plain_data_loads(checkpoint: Path):
    loaded = load(checkpoint)
    assert torch.equal(loaded["weight"], torch.arange(6.0))
    assert loaded["object"] == {"step": 3, "name": "Adam"}


@pytest.mark.parametrize("place", ["metadata", "objects", "tensors"])
def test_code_is_refused(place: str, checkpoint: Path, tmp_path: Path):
    proof = tmp_path / "it-ran"
    file = exploits.PLACES[place](checkpoint, proof)
    with pytest.raises(UnsafeCheckpointError, match=rf"{checkpoint}/{file} would run \w*\.mknod"):
        load(checkpoint)
    assert not proof.exists()


def test_code_in_common_is_refused(tmp_path: Path):
    from megatron.core.dist_checkpointing import serialization

    proof = tmp_path / "it-ran"
    (tmp_path / "metadata.json").write_text('{"sharded_backend": "torch_dist"}', encoding="utf-8")
    exploits.in_common(tmp_path, proof)
    with pytest.raises(UnsafeCheckpointError, match=r"common\.pt would run"):
        serialization.load_common_state_dict(tmp_path)
    assert not proof.exists()
    torch.save({"iteration": 4}, tmp_path / "common.pt")
    assert serialization.load_common_state_dict(tmp_path) == {"iteration": 4}


@pytest.mark.parametrize(
    "names",
    [
        ("os", "system"),
        ("builtins", "eval"),
        ("torch", "load"),
        ("torch.distributed.checkpoint.metadata", "os.system"),
        ("torch", "serialization.os.system"),
    ],
)
def test_no_other_name_gets_through(names: tuple[str, str], tmp_path: Path):
    """Nor dotted names, with which a pickle walks from an allowed module to any other."""
    path = tmp_path / "pickle"
    words = b"".join(b"\x8c" + bytes([len(word)]) + word.encode() for word in names)
    path.write_bytes(b"\x80\x04" + words + b"\x93.")
    with pytest.raises(pickle.UnpicklingError), path.open("rb") as file:
        load_metadata(file)


@pytest.mark.parametrize("length", [None, 0, 40])
@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_damage_names_the_file(name: str, length: int | None, checkpoint: Path):
    if length is None:
        (checkpoint / name).unlink()
    else:
        os.truncate(checkpoint / name, length)
    with pytest.raises(DamagedCheckpointError) as caught:
        load(checkpoint)
    assert f"{checkpoint / name} cannot be read" in str(caught.value)
    assert "\n" not in str(caught.value)
