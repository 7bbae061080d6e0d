"""A config.json that is damaged or lies: a one-line error at once from every tool that reads it."""

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from support.conversions import from_hf, run, save_exported
from support.smlp_systems import make_model

from megatron_smlp.conversion.huggingface import check_folder
from megatron_smlp.errors import UsageError
from megatron_smlp.generation import language_model


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_exported(
        make_model("smlp_deterministic"), tmp_path_factory.mktemp("hf") / "exported"
    )


LIES: list[tuple[Any, str]] = [
    *(({"hidden_size": value}, "hidden_size") for value in ([1, 2], 1.5)),
    ({"hidden_size": -1}, "this model cannot be built"),
    ({"num_layers": {}}, "num_layers"),
    *(({"vocab_size": value}, "vocab_size") for value in (None, "text", True)),
    ({"moe_layer_freq": "often"}, "moe_layer_freq"),
    ({"add_bias_linear": "yes"}, "add_bias_linear"),
    *(({name: [1]}, "") for name in ("model_type", "dtype", "quantization_config", "id2label")),
    ({"max_position_embeddings": 10**9}, "this model cannot be built"),
    *((text, "config.json") for text in ("[]", "", "[" * 100_000, '{"a":' * 100_000, "\xff")),
]


@pytest.mark.parametrize(("lie", "named"), LIES, ids=lambda value: str(value)[:40])
def test_a_config_that_lies(exported: Path, tmp_path: Path, lie: Any, named: str):
    """The converter, generation and the check before an evaluation each refuse it at once."""
    folder = Path(shutil.copytree(exported, tmp_path / "folder"))
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = lie if isinstance(lie, str) else json.dumps(values | lie)
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    refusals = []
    for read in (
        lambda: run(from_hf, folder, tmp_path / "run", checks=False),
        lambda: language_model._exported(argparse.Namespace(hf=str(folder), dtype="auto")),
        lambda: check_folder(folder),
    ):
        start = time.monotonic()
        with pytest.raises(UsageError) as error:
            read()
        refusals.append(str(error.value))
        assert time.monotonic() - start < 10
        assert "\n" not in refusals[-1]
    assert any(named in refusal for refusal in refusals), refusals
    assert not (tmp_path / "run").exists()
