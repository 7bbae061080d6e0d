"""A Transformer with RoPE, RMSNorm and SwiGLU, as transformers stores it: `LlamaForCausalLM`.

Both compute the same function, but Llama's queries, keys and values are three tensors, which
Megatron fuses group by group, as it fuses the two projections of SwiGLU. A Transformer of ours that
is not a Llama, such as one with token experts, is exported as our own model.

Letters: D hidden, Z FFN width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_smlp.conversion.huggingface import impossible, theirs_of
from megatron_smlp.conversion.names import QKV, Names
from megatron_smlp.errors import UsageError
from megatron_smlp.hf.configuration_smlp import SMLPConfig

MODEL_TYPE = "llama"
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
NO_WEIGHT = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""A table in the files of Llama 1 and 2, which can be computed from config.json."""
TENSORS = Names(
    outside={
        "embedding.word_embeddings": "model.embed_tokens",
        "decoder.final_layernorm": "model.norm",
        "output_layer": "lm_head",
    },
    layers="model.layers",
    in_layer={
        "input_layernorm": ("input_layernorm",),
        QKV: tuple(f"self_attn.{part}_proj" for part in "qkv"),
        "self_attention.linear_proj": ("self_attn.o_proj",),
        "pre_mlp_layernorm": ("post_attention_layernorm",),
        "mlp.linear_fc1": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.linear_fc2": ("mlp.down_proj",),
    },
)
import_plan = TENSORS.import_plan
# Our configuration's names -> Llama's, for what means the same in both.
NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "max_position_embeddings": "max_position_embeddings",
    "add_bias_linear": "attention_bias",
    "attention_dropout": "attention_dropout",
    "tie_word_embeddings": "tie_word_embeddings",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
}
KEPT = ("unpadded_vocab_size", "hidden_dropout")
# What makes a model a Llama, in terms of our configuration.
IS_LLAMA = {
    "input_projection": "embedding",
    "architecture": "transformer",
    "token_router": "none",
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "swiglu": True,
    "qk_layernorm": False,
}


def fits(config: SMLPConfig) -> bool:
    """Return whether the model is a Llama."""
    return all(getattr(config, name) == value for name, value in IS_LLAMA.items())


def exported(config: SMLPConfig) -> Any:
    """Return transformers' LlamaConfig for a model that is a Llama."""
    from transformers import LlamaConfig

    # LlamaConfig does not define these, but transformers keeps them for us.
    kept = {name: value for name in KEPT if (value := getattr(config, name))}
    return LlamaConfig(
        **{theirs: getattr(config, ours) for ours, theirs in NAMES.items()},
        rms_norm_eps=float(config.layer_norm_epsilon),
        num_key_value_heads=config.num_query_groups or config.num_attention_heads,
        rope_parameters={"rope_type": "default", "rope_theta": float(config.rotary_base)},
        mlp_bias=config.add_bias_linear,
        **kept,
    )


def config_in(values: Mapping[str, Any], folder: Path) -> SMLPConfig:
    """Return our configuration of the model that Llama's `config.json` describes.

    Raises:
        UsageError: it is of another model, or of one that computes what ours cannot.
    """
    with impossible(f"{folder}/config.json"):
        theirs = theirs_of(values)
        rope = theirs.rope_parameters
        base, kind = rope["rope_theta"], rope["rope_type"]
        width = theirs.hidden_size // theirs.num_attention_heads
    for name, value, only in (
        ("hidden_act", theirs.hidden_act, "silu"),
        ("rope_type", kind, "default"),
        ("rope_theta", base, int(base)),
        ("head_dim", theirs.head_dim, width),
        ("mlp_bias", theirs.mlp_bias, theirs.attention_bias),
    ):
        if value != only:
            raise UsageError(
                f"{folder}/config.json: {name}={value} is not supported; only {only} can be "
                "imported."
            )
    heads, groups = theirs.num_attention_heads, theirs.num_key_value_heads
    with impossible(f"{folder}/config.json"):
        return SMLPConfig(
            **IS_LLAMA,
            **{ours: getattr(theirs, name) for ours, name in NAMES.items()},
            layer_norm_epsilon=theirs.rms_norm_eps,
            unpadded_vocab_size=values.get("unpadded_vocab_size") or theirs.vocab_size,
            num_query_groups=None if groups == heads else groups,
            rotary_base=int(base),
            hidden_dropout=values.get("hidden_dropout", 0.0),
        )
