"""Build the Megatron model that a checkpoint's flags describe, without memory for its weights.

It tells which tensors its checkpoints hold, in which shapes, and it computes logits while reading
the weights one at a time. It is the model that pretrain_smlp.py trains: the same layers from the
same table. Must run inside `platform.one_process`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megatron_smlp.checkpoints.tensors import Source
from megatron_smlp.conversion.streamed_weights import weights_from
from megatron_smlp.errors import UsageError
from megatron_smlp.options import PLUGIN_OPTIONS

# As pretrain_smlp.py sets it on a machine without Apex and Transformer Engine, in fp32.
ON_CPU: dict[str, Any] = {
    "params_dtype": torch.float32,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "use_cpu_initialization": True,
    "perform_initialization": False,
    "transformer_impl": "local",
    "window_size": None,  # Transformer Engine's, and without weights
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "bias_dropout_fusion": False,
    "persist_layer_norm": False,
    "hash_table": None,
    "moe_eval_capacity_factor": None,  # as in exported models
}
EXPERT = re.compile(r"\.experts\.local_experts\.(\d+)\.")
STACKED = ".experts.experts."


class _OnMeta(TorchFunctionMode):
    """Creates tensors on the `meta` device, also where a module names another device."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "") in ("empty", "zeros", "ones", "full"):
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def build(flags: Mapping[str, Any]) -> Any:
    """Build Megatron's GPTModel in evaluation mode, its parameters on the meta device.

    Args:
        flags: the contents of a checkpoint's model.json.

    Raises:
        UsageError: its sizes are beyond what a tensor can have.
    """
    try:
        return _build(flags)
    except (RuntimeError, OverflowError, ValueError) as error:
        raise UsageError(f"this model cannot be built: {str(error).splitlines()[0]}") from error


def _build(flags: Mapping[str, Any]) -> Any:
    from megatron.core.models.gpt import GPTModel

    from megatron_smlp.architectures import SMLPTransformerConfig, block_spec
    from megatron_smlp.layers.minhash import replace_embedding
    from megatron_smlp.model import activation
    from megatron_smlp.plugins import compute_tables
    from megatron_smlp.routers.hash import attach_token_ids
    from megatron_smlp.systems import weighs_all_experts

    known = {field.name for field in dataclasses.fields(SMLPTransformerConfig)}
    values = {name: value for name, value in flags.items() if name in known} | ON_CPU
    values["moe_router_pre_softmax"] = weighs_all_experts(
        flags["token_router"], flags["moe_router_topk"]
    )
    config = SMLPTransformerConfig(
        **values,
        num_moe_experts=flags["num_experts"],
        gated_linear_unit=flags["swiglu"] or flags["quick_geglu"],
        activation_func=activation(flags),
        spatial_length=flags["seq_length"],
        hash_vocab_size=flags["padded_vocab_size"],
    )
    for name in PLUGIN_OPTIONS:
        setattr(config, name, flags[name])
    with _OnMeta():
        model = GPTModel(
            config,
            block_spec(config),
            vocab_size=flags["padded_vocab_size"],
            max_sequence_length=flags["max_position_embeddings"],
            share_embeddings_and_output_weights=not flags["untie_embeddings_and_output_weights"],
            position_embedding_type=flags["position_embedding_type"],
            rotary_percent=flags["rotary_percent"],
            rotary_base=flags["rotary_base"],
            rope_scaling=flags["use_rope_scaling"],
            rope_scaling_factor=flags["rope_scaling_factor"],
            seq_len_interpolation_factor=flags["rotary_seq_len_interpolation_factor"],
        )
        replace_embedding(model)
    attach_token_ids(model)
    compute_tables(model)
    return model.eval()


def expected_shapes(flags: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the tensor shapes of the model's checkpoints by global name; experts are stacked."""
    model = build(flags)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            continue
        if name == "output_layer.weight" and model.share_embeddings_and_output_weights:
            continue
        match = EXPERT.search(name)
        if match is None:
            shapes[name] = tuple(value.shape)
        else:
            stacked = EXPERT.sub(STACKED, name)
            shapes[stacked] = (int(match[1]) + 1, *value.shape)
    return shapes


def object_names(flags: Mapping[str, Any]) -> list[str]:
    """Return the names of a checkpoint's other objects: slots for Transformer Engine's state."""
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    metadata = {"dp_cp_group": group, "singleton_local_shards": False}
    state = build(flags).sharded_state_dict(metadata=metadata)
    return [value.unique_key for value in state.values() if isinstance(value, ShardedObject)]


@torch.no_grad()
def logits(model: Any, source: Source, tokens: Tensor) -> Tensor:
    """Compute logits of `tokens` with the weights of a checkpoint, in fp32.

    tokens: <int64>[B, T]. Returns <fp32>[B, T, V].
    """

    def read(name: str, row: int | None) -> Tensor:
        match = EXPERT.search(name)
        if match is None:
            return source.read(name, row)
        return source.read(EXPERT.sub(STACKED, name), int(match[1]))  # one of a stack

    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    # Functions that Megatron compiles run once: compiling takes longer, and looks for a GPU.
    eagerly = torch.compiler.set_stance("force_eager")
    with eagerly, weights_from(read, model):
        output: Tensor = model(tokens, positions, None)
    return output
