"""Read GPT-2, as transformers stores it, as a `--architecture transformer` model.

Both compute the same function, but GPT-2's `Conv1D` stores its weights as [in, out]; its queries,
keys and values are concatenated, where Megatron has them head by head; and older files lack the
prefix `transformer.`, or hold the causal mask or the tied output layer as a tensor.

Letters: D hidden, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_smlp.conversion.huggingface import impossible, theirs_of
from megatron_smlp.conversion.names import QKV, HeadShape, Names, join_qkv
from megatron_smlp.conversion.recipes import Recipe, same
from megatron_smlp.errors import UsageError
from megatron_smlp.hf.configuration_smlp import SMLPConfig

MODEL_TYPE = "gpt2"
PREFIX = "transformer."
HEAD = "lm_head.weight"
EMBEDDING = "transformer.wte.weight"
MATRICES = ("linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight")
NO_WEIGHT = re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)")

TENSORS = Names(
    outside={
        "embedding.word_embeddings": "transformer.wte",
        "embedding.position_embeddings": "transformer.wpe",
        "decoder.final_layernorm": "transformer.ln_f",
        "output_layer": "lm_head",
    },
    layers="transformer.h",
    in_layer={
        "input_layernorm": ("ln_1",),
        QKV: ("attn.c_attn",),
        "self_attention.linear_proj": ("attn.c_proj",),
        "pre_mlp_layernorm": ("ln_2",),
        "mlp.linear_fc1": ("mlp.c_fc",),
        "mlp.linear_fc2": ("mlp.c_proj",),
    },
)
# GPT-2's activation -> ours; the first two are the same function.
ACTIVATIONS = {"gelu_new": "gelu_new", "gelu_pytorch_tanh": "gelu_new", "gelu": "gelu"}
# Settings that our model does not have, each with the only value that can be imported.
UNSUPPORTED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}


def config_in(values: Mapping[str, Any], folder: Path) -> SMLPConfig:
    """Return our configuration of the model that GPT-2's `config.json` describes.

    Raises:
        UsageError: it is of another model, or of one that computes what ours cannot.
    """
    if values.get("model_type") != MODEL_TYPE:
        raise UsageError(
            f"{folder}/config.json has model type {values.get('model_type')!r}, not {MODEL_TYPE!r}."
        )
    with impossible(f"{folder}/config.json"):
        theirs = theirs_of(values)
    for name, only in UNSUPPORTED.items():
        if getattr(theirs, name) != only:
            raise UsageError(
                f"{folder}/config.json: {name}={getattr(theirs, name)} is not supported by "
                f"Megatron's attention; only {only} can be imported."
            )
    if theirs.activation_function not in ACTIVATIONS:
        raise UsageError(
            f"{folder}/config.json: activation_function={theirs.activation_function!r} cannot be "
            f"imported; only {', '.join(ACTIVATIONS)} can."
        )
    with impossible(f"{folder}/config.json"):
        return SMLPConfig(
            architecture="transformer",
            vocab_size=theirs.vocab_size,
            unpadded_vocab_size=theirs.vocab_size,
            hidden_size=theirs.n_embd,
            ffn_hidden_size=theirs.n_inner or 4 * theirs.n_embd,
            num_layers=theirs.n_layer,
            num_attention_heads=theirs.n_head,
            max_position_embeddings=theirs.n_positions,
            layer_norm_epsilon=theirs.layer_norm_epsilon,
            hidden_dropout=theirs.resid_pdrop,  # also of embeddings: Megatron has one rate
            attention_dropout=theirs.attn_pdrop,
            hidden_act=ACTIVATIONS[theirs.activation_function],
            tie_word_embeddings=theirs.tie_word_embeddings,
            bos_token_id=theirs.bos_token_id,
            eos_token_id=theirs.eos_token_id,
            pad_token_id=theirs.pad_token_id,
        )


def with_prefix(name: str) -> str:
    """Return the name of a tensor as newer files spell it."""
    return name if name == HEAD or name.startswith(PREFIX) else PREFIX + name


def import_plan(names: Iterable[str], flags: Mapping[str, Any]) -> dict[str, Recipe]:
    """Return recipes for a Megatron checkpoint's `names` from GPT-2's tensors."""
    heads = HeadShape.of(flags)
    return {name: _recipe(name, heads) for name in names}


def _recipe(name: str, heads: HeadShape) -> Recipe:
    sources = TENSORS.of(name)
    if QKV in name:
        return Recipe(sources, partial(_head_by_head, heads=heads))
    return Recipe(sources, _transposed if name.endswith(MATRICES) else same)


def _transposed(weight: Tensor) -> Tensor:
    return weight.T.contiguous()


def _head_by_head(fused: Tensor, *, heads: HeadShape) -> Tensor:
    """Reorder queries, keys, values: [D, 3 D] or [3 D] -> [3 D, D] or [3 D], head by head."""
    queries, keys, values = (fused.T if fused.dim() == 2 else fused).chunk(3)
    return join_qkv(queries, keys, values, heads)
