"""Builds Megatron's GPTModel, with the layers of our table, from arguments."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from megatron.core.activations import quick_gelu, squared_relu
from megatron.training import get_args
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.arguments import core_transformer_config_from_args
from torch import Tensor
from torch.nn import functional

from megatron_smlp.architectures import SMLPTransformerConfig, block_spec
from megatron_smlp.data.balanced_hash_table import experts_of_training_data
from megatron_smlp.data.tokenizers.factory import strings_of_tokens
from megatron_smlp.layers.minhash import fingerprints, replace_embedding
from megatron_smlp.options import PLUGIN_OPTIONS
from megatron_smlp.routers.hash import attach_token_ids

tanh_gelu = partial(functional.gelu, approximate="tanh")
"""GPT-2's GELU, transformers' `gelu_new`."""


def activation(flags: Mapping[str, Any]) -> Callable[[Tensor], Tensor]:
    """Return the activation that Megatron's flags select; the default is exact GELU.

    Megatron 0.19 parses --openai-gelu but ignores it.
    """
    if flags["swiglu"]:
        return functional.silu
    if flags["squared_relu"]:
        return squared_relu
    if flags["quick_geglu"]:
        return quick_gelu
    return tanh_gelu if flags["openai_gelu"] else functional.gelu


def transformer_config(args: argparse.Namespace) -> SMLPTransformerConfig:
    """Translate arguments as Megatron does, but into our config class."""
    config = core_transformer_config_from_args(args, config_class=SMLPTransformerConfig)
    config.spatial_length = args.seq_length
    for name in PLUGIN_OPTIONS:
        setattr(config, name, getattr(args, name))
    if args.openai_gelu:
        config.activation_func = activation(vars(args))
    config.hash_vocab_size = args.padded_vocab_size
    return config


def model_config(args: argparse.Namespace) -> Any:
    """Return the GPTModelConfig that Megatron builds the model from."""
    config = transformer_config(args)
    model = gpt_config_from_args(args, config=config)
    model.rope_scaling_factor = args.rope_scaling_factor  # Megatron 0.19 drops the factor
    model.transformer_layer_spec = _layers
    model.pre_wrap_hooks += [_with_token_ids, _with_input_projection, _on_device]
    return model


def _with_token_ids(stages: list[Any]) -> list[Any]:
    for stage in stages:
        attach_token_ids(stage)
    return stages


def _with_input_projection(stages: list[Any]) -> list[Any]:
    """Replace the embedding by the projection of --input-projection minhash, and fill its table."""
    args = get_args()
    for stage in stages:
        if projection := replace_embedding(stage):
            table = fingerprints(
                strings_of_tokens(args),
                num_ids=args.padded_vocab_size,
                hash_count=args.hash_count,
                filter_size=args.filter_size,
            )
            projection.fingerprints.copy_(table)
    return stages


def _on_device(stages: list[Any]) -> list[Any]:
    """Move a model to its device if its weights were drawn on the CPU, where Megatron leaves it."""
    for stage in stages:
        if stage.config.use_cpu_initialization:
            stage.cuda()
    return stages


def _layers(model: Any, vp_stage: int | None = None) -> Any:
    """Return the layers, the first part of a model that every rank builds; computing the balanced
    table is collective."""
    config = model.transformer
    if config.hash_table and config.balanced_experts is None:
        config.balanced_experts = experts_of_training_data(get_args())
    return block_spec(config, vp_stage=vp_stage)
