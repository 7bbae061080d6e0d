"""The same weights with another activation or other positions are another model."""

from typing import Any

import pytest

from megatron_smlp.conversion.huggingface import config_of, flags_of
from megatron_smlp.errors import UsageError
from megatron_smlp.hf.configuration_smlp import SMLPConfig

TRANSFORMER = {"architecture": "transformer", "num_attention_heads": 4}
GMLP = {"architecture": "gmlp"}


@pytest.mark.parametrize(
    ("model", "name", "value"),
    [
        *((TRANSFORMER, name, True) for name in ("squared_relu", "quick_geglu", "qk_l2_norm")),
        (TRANSFORMER, "no_rope_freq", 2),
        (TRANSFORMER, "rotary_percent", 0.5),
        (TRANSFORMER, "activation_func_clamp_value", 7.0),
        (TRANSFORMER, "position_embedding_type", "yarn"),
        (GMLP, "position_embedding_type", "rope"),
    ],
)
def test_what_the_exported_model_does_not_have(model: dict[str, Any], name: str, value: object):
    flags = flags_of(SMLPConfig(**model))
    assert config_of(flags)
    with pytest.raises(UsageError, match="is not supported by the Hugging Face model"):
        config_of({**flags, name: value})
