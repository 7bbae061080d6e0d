"""The same weights under another activation or other positions are another model."""

from pathlib import Path
from typing import Any

import pytest
from support.conversions import run
from support.in_process import prepare_megatron, pretrained

from megatron_smlp.checkpoints.torch_dist import TorchDistCheckpoint
from megatron_smlp.conversion import convert
from megatron_smlp.conversion.huggingface import config_of, flags_of
from megatron_smlp.errors import UsageError
from megatron_smlp.flags.model_arguments import model_arguments
from megatron_smlp.flags.parse import build_parser
from megatron_smlp.hf.configuration_smlp import SMLPConfig


@pytest.mark.parametrize(
    "words",
    [
        "--qk-l2-norm",
        "--position-embedding-type rope --no-rope-freq 2",
        "--position-embedding-type rope --rotary-percent 0.5",
    ],
)
def test_functions_without_weights_are_recorded(words: str, tmp_path: Path):
    """They are evaluated as they were trained, and exported by nobody as something else."""
    transformer = "--architecture transformer --num-attention-heads 4 --train-iters 1"
    with pretrained(f"{transformer} {words} --save {tmp_path / 'run'}"):
        pass
    flag = words.split()[-2] if " " in words else words
    with pytest.raises(UsageError, match=f"{flag} .* has no equal"):
        run(convert.torch_dist_to_hf, tmp_path / "run", tmp_path / "hf", checks=False)
    prepare_megatron()
    flags = model_arguments(build_parser(), TorchDistCheckpoint(tmp_path / "run").flags)
    assert any(given.startswith(flag) for given in flags)


TRANSFORMER = {"architecture": "transformer", "num_attention_heads": 4}
GMLP = {"architecture": "gmlp"}


@pytest.mark.parametrize(
    ("model", "name", "value"),
    [
        *((TRANSFORMER, name, True) for name in ("squared_relu", "quick_geglu")),
        (TRANSFORMER, "activation_func_clamp_value", 7.0),
        (TRANSFORMER, "position_embedding_type", "yarn"),
        (GMLP, "position_embedding_type", "rope"),
    ],
)
def test_what_the_exported_model_does_not_have(model: dict[str, Any], name: str, value: object):
    flags = flags_of(SMLPConfig(**model))
    assert config_of(flags)
    with pytest.raises(UsageError, match="has no equal in the Hugging Face model"):
        config_of({**flags, name: value})
