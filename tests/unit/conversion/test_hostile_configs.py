"""A config.json that is damaged or lies: one line, at once, from every tool that reads it."""

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from support.conversions import from_hf, run, save_exported
from support.smlp_systems import make_model

from megatron_smlp.checkpoints.folders import MARKER, SUMS
from megatron_smlp.checkpoints.integrity import seal
from megatron_smlp.checkpoints.torch_dist import TorchDistCheckpoint
from megatron_smlp.conversion import convert
from megatron_smlp.conversion.huggingface import check_folder
from megatron_smlp.errors import UsageError, UserError
from megatron_smlp.generation import language_model


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_exported(
        make_model("smlp_deterministic"), tmp_path_factory.mktemp("hf") / "exported"
    )


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "folder"))


def _say(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(values), encoding="utf-8")


def _refusals(folder: Path, tmp_path: Path) -> list[str]:
    """The converter, generation and the check before an evaluation refuse it, each in a second."""
    refusals = []
    for read in (
        lambda: run(from_hf, folder, tmp_path / "run", checks=False),
        lambda: language_model._exported(argparse.Namespace(hf=str(folder))),
        lambda: check_folder(folder),
    ):
        start = time.monotonic()
        with pytest.raises(UsageError) as error:
            read()
        refusals.append(str(error.value))
        assert time.monotonic() - start < 10
        assert "\n" not in refusals[-1]
    assert not (tmp_path / "run").exists()
    return refusals


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("hidden_size", value) for value in ([1, 2], 1.5, -1)),
        *(("num_layers", value) for value in ({}, -1)),
        *(("vocab_size", value) for value in (None, "text", True, -1)),
    ],
)
def test_a_size_that_is_none(folder: Path, tmp_path: Path, key: str, value: object) -> None:
    _say(folder, **{key: value})
    _refusals(folder, tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"moe_layer_freq": "often"},
        {"add_bias_linear": "yes"},
        {"initializer_range": -1},
        {"layer_norm_epsilon": float("inf")},
        {"model_type": ["smlp"]},
        {"dtype": [1]},
        {"quantization_config": "text"},
        {"id2label": [1]},
        {"max_position_embeddings": 10**9},
    ],
)
def test_other_values(folder: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    _say(folder, **changes)
    _refusals(folder, tmp_path)


@pytest.mark.parametrize("text", ["[]", "null", "", "[" * 100_000, '{"a":' * 100_000, "\xff"])
def test_no_object(folder: Path, tmp_path: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    _refusals(folder, tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_layers": 10**9}, "too few for a model of 1000000000 layers"),
        ({"num_hidden_layers": 10**9}, "too few for a model of 1000000000 layers"),
        ({"num_experts": 10**6}, "rows for 1000000 experts"),
    ],
)
def test_sizes_that_the_weights_do_not_have(
    folder: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    _say(folder, **changes)
    assert any(words in refusal for refusal in _refusals(folder, tmp_path))


@pytest.mark.parametrize("changes", [{"num_layers": 10**9}, {"num_experts": 10**6}, None])
def test_flags_of_a_checkpoint(exported: Path, tmp_path: Path, changes: Any) -> None:
    run(from_hf, exported, tmp_path / "run", checks=False)
    path = TorchDistCheckpoint(tmp_path / "run").folder / "model.json"
    flags = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(flags | changes if changes else [flags]), encoding="utf-8")
    for name in (SUMS, MARKER):
        (path.parent / name).unlink()
    seal(path.parent)  # checksums are no protection from intent
    with pytest.raises(UserError, match=r"layers|experts|not hold a JSON object"):
        run(convert.torch_dist_to_hf, tmp_path / "run", tmp_path / "hf", checks=False)
