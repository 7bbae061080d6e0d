"""The Megatron model that the flags of a checkpoint describe, without memory for its weights.

It says which tensors a checkpoint of it holds, in which shapes, and it computes logits with the
weights read one at a time. It is the model that pretrain_smlp.py trains: the same
layers by the same table. Needs `platform.one_process` around it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megatron_smlp.checkpoints.tensors import Source
from megatron_smlp.conversion.streamed_weights import weights_from
from megatron_smlp.errors import UsageError

# As pretrain_smlp.py sets it on a machine without Apex and Transformer Engine, in fp32.
ON_CPU: dict[str, Any] = {
    "params_dtype": torch.float32,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "use_cpu_initialization": True,
    "perform_initialization": False,
    "transformer_impl": "local",
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "bias_dropout_fusion": False,
    "persist_layer_norm": False,
    "moe_router_pre_softmax": True,
    "hash_table": None,
    "moe_eval_capacity_factor": None,  # as in what is exported
}
EXPERT = re.compile(r"\.experts\.local_experts\.(\d+)\.")
STACKED = ".experts.experts."


class _OnMeta(TorchFunctionMode):
    """Tensors without values on the `meta` device, also where a module names another device."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "") in ("empty", "zeros", "ones", "full"):
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def build(flags: Mapping[str, Any]) -> Any:
    """Megatron's GPTModel in evaluation mode, its parameters on the meta device.

    Args:
        flags: the contents of a checkpoint's model.json.

    Raises:
        UsageError: its sizes are beyond what a tensor can have.
    """
    try:
        return _build(flags)
    except (RuntimeError, OverflowError) as error:
        raise UsageError(f"no such model can be built: {str(error).splitlines()[0]}") from error


def _build(flags: Mapping[str, Any]) -> Any:
    from megatron.core.models.gpt import GPTModel

    from megatron_smlp.architectures import SMLPTransformerConfig, block_spec
    from megatron_smlp.model import activation
    from megatron_smlp.routers.hash import give_token_ids

    known = {field.name for field in dataclasses.fields(SMLPTransformerConfig)}
    values = {name: value for name, value in flags.items() if name in known} | ON_CPU
    config = SMLPTransformerConfig(
        **values,
        num_moe_experts=flags["num_experts"],
        gated_linear_unit=flags["swiglu"] or flags["quick_geglu"],
        activation_func=activation(flags),
        spatial_length=flags["seq_length"],
        hash_vocab_size=flags["padded_vocab_size"],
    )
    with _OnMeta(), _quiet_deprecation():
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
        ).eval()
    give_token_ids(model)
    return model


@contextlib.contextmanager
def _quiet_deprecation() -> Iterator[None]:
    """Megatron says that its GPTModel, which it trains, is deprecated."""
    import logging

    logger = logging.getLogger("megatron.core.models.gpt.gpt_model")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _state(model: Any) -> dict[str, Tensor]:
    """Parameters and buffers that are saved, by this process's names."""
    return {
        name: value for name, value in model.state_dict(keep_vars=True).items() if _is_tensor(value)
    }


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def expected_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model's checkpoints, by its global name; experts are stacked there."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, value in _state(model).items():
        if name == "output_layer.weight" and model.share_embeddings_and_output_weights:
            continue
        match = EXPERT.search(name)
        if match is None:
            shapes[name] = tuple(value.shape)
        else:
            stacked = EXPERT.sub(STACKED, name)
            shapes[stacked] = (int(match[1]) + 1, *value.shape)
    return shapes


def object_names(model: Any) -> list[str]:
    """What a checkpoint of it holds beside tensors: a place for Transformer Engine's state."""
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    metadata = {"dp_cp_group": group, "singleton_local_shards": False}
    state = model.sharded_state_dict(metadata=metadata)
    return [value.unique_key for value in state.values() if isinstance(value, ShardedObject)]


class _LocalNames:
    """A checkpoint's tensors under the names that they have in the model of this process."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def read(self, name: str, row: int | None = None) -> Tensor:
        """An expert's weight is a row of the stack, of which no model here takes a row again."""
        match = EXPERT.search(name)
        if match is None:
            return self.source.read(name, row)
        return self.source.read(EXPERT.sub(STACKED, name), int(match[1]))


@torch.no_grad()
def logits(model: Any, source: Source, tokens: Tensor) -> Tensor:
    """Logits of `tokens` with the weights of a checkpoint, in fp32.

    tokens: <int64>[B, T]. Returns <fp32>[B, T, V].
    """
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with weights_from(_LocalNames(source), model):
        output: Tensor = model(tokens, positions, None)
    return output
