"""Small models of all systems, with weights large enough for every part to matter."""

from typing import Any

import torch

from megatron_smlp.hf.configuration_smlp import SMLPConfig
from megatron_smlp.hf.modeling_smlp import SMLPForCausalLM

VOCABULARY = 101
LONGEST = 40

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": LONGEST,
    "num_experts": 4,
    "moe_ffn_hidden_size": 20,
    "tiny_attention_width": 8,
}
_TRANSFORMER = {"architecture": "transformer"}
_SPARSE = {"architecture": "smlp", "num_dense_layers": 1, "num_feature_experts": 3}

SYSTEMS: dict[str, dict[str, Any]] = {
    "transformer": _TRANSFORMER,
    "switch": {"architecture": "transformer", "token_router": "switch", "moe_layer_freq": 2},
    "gshard": {
        "architecture": "transformer",
        "token_router": "gshard",
        "moe_layer_freq": [0, 1, 1],
    },
    "base": {"architecture": "transformer", "token_router": "base"},
    "hash": {"architecture": "transformer", "token_router": "hash"},
    "gmlp": {"architecture": "gmlp"},
    "gmlp_heads": {
        "architecture": "gmlp",
        "spatial_heads": 3,
        "token_router": "base",
        "base_gate": "price",
    },
    "amlp": {"architecture": "amlp", "spatial_heads": 2},
    "amlp_rope": {"architecture": "amlp", "position_embedding_type": "rope", "rotary_base": 500},
    "smlp_deterministic": {**_SPARSE, "feature_router": "deterministic", "token_router": "base"},
    "smlp_partial": {
        **_SPARSE,
        "feature_router": "partial",
        "num_feature_chunks": 6,
        "token_router": "switch",
    },
    "gmlp_toeplitz": {"architecture": "gmlp", "spatial_heads": 2, "toeplitz": True},
    "smlp_partial_toeplitz": {
        **_SPARSE,
        "feature_router": "partial",
        "num_feature_chunks": 6,
        "toeplitz": True,
    },
    "mixer": {"architecture": "mixer", "spatial_heads": 2, "mixer_expansion": True},
    "mixer_routed": {"architecture": "mixer", "toeplitz": True, "token_router": "switch"},
    "minhash": {
        "architecture": "mixer",
        "input_projection": "minhash",
        "hash_count": 6,
        "filter_size": 16,
        "window": 2,
    },
    "minhash_routed": {
        "architecture": "transformer",
        "input_projection": "minhash",
        "filter_size": 16,
        "window": 0,
        "token_router": "base",
        "moe_layer_freq": 2,
    },
    "modern": {
        "architecture": "transformer",
        "position_embedding_type": "rope",
        "swiglu": True,
        "num_query_groups": 2,
        "add_bias_linear": False,
    },
    "modern_moe": {
        "architecture": "transformer",
        "position_embedding_type": "rope",
        "rotary_base": 500,
        "normalization": "RMSNorm",
        "qk_layernorm": True,
        "swiglu": True,
        "token_router": "topk",
        "moe_layer_freq": [0, 1, 1],
        "moe_router_topk": 3,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_shared_expert_intermediate_size": 12,
    },
    "grouped": {
        "architecture": "transformer",
        "position_embedding_type": "rope",
        "num_query_groups": 2,
        "qk_layernorm": True,
        "token_router": "topk",
        "moe_router_num_groups": 2,
        "moe_router_group_topk": 1,
    },
    "smlp_unrouted": {**_SPARSE, "token_router": "hash", "hidden_act": "gelu_new"},
}


def make_config(system: str, **changes: Any) -> SMLPConfig:
    return SMLPConfig(**{**_SIZES, **SYSTEMS[system], **changes})


def make_model(system: str, **changes: Any) -> SMLPForCausalLM:
    """Make a model in evaluation mode. Real initial values would leave M and routers no effect."""
    model = SMLPForCausalLM(make_config(system, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
        for name, buffer in model.named_buffers():
            if name.endswith(".fingerprints"):  # as if every token had a string of its own
                buffer.random_(model.config.filter_size)
            if name.endswith(".prices"):
                buffer.normal_(std=0.2)
    return model.eval()


def make_ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (batch, length))
