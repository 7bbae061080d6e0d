"""Shared by the token mixers with projections: how they are built, and how checkpoints store them.

A mixer reads D features of each token, works on a width of its own that tensor parallelism shards,
and writes D features; the two linear layers are Megatron's, or Transformer Engine's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from torch import nn

# Transformer Engine's overlap of communication knows four layers by name, each with a buffer for
# [T, B, D]: "qkv" and "fc1" gather their input, "proj" and "fc2" scatter their output.


def await_parameters(module: nn.Module) -> None:
    """Wait for parameters that are read without a call of their module.

    With --overlap-param-gather they are on their way from other ranks until the hook before that
    call has waited for them.
    """
    for hook in module._forward_pre_hooks.values():
        hook(module, ())


def column_projection(
    layer: Any, config: TransformerConfig, width: int, *, name: str, tp_group: Any, **stride: int
) -> Any:
    """Build D -> `width`, of which each rank has a part.

    Args:
        layer: its spec or class.
        name: that of the buffer, see above.
        stride: of a projection that is several side by side, each of which is sharded by itself.
    """
    return build_module(
        layer,
        config.hidden_size,
        width,
        config=config,
        init_method=config.init_method,
        gather_output=False,
        bias=config.add_bias_linear,
        skip_bias_add=False,
        is_expert=False,
        tp_comm_buffer_name=name,
        tp_group=tp_group,
        **stride,
    )


def row_projection(
    layer: Any, config: TransformerConfig, width: int, *, name: str, tp_group: Any
) -> Any:
    """Build `width` -> D; the bias is returned beside the product, for the slot to add."""
    return build_module(
        layer,
        width,
        config.hidden_size,
        config=config,
        init_method=config.output_layer_init_method,
        bias=config.add_bias_linear,
        input_is_parallel=True,
        skip_bias_add=True,
        is_expert=False,
        tp_comm_buffer_name=name,
        tp_group=tp_group,
    )


def shard_halves(
    sharded: dict[str, Any],
    keys: Iterable[str],
    *,
    offsets: tuple[Any, ...],
    metadata: Mapping[str, Any],
    tp_group: Any,
) -> None:
    """Describe tensors that are two side by side, [A | B], as one with A's rows first.

    In the checkpoint each is that one tensor for any tensor parallel size. What is not in `sharded`
    is left out.
    """
    for key in keys:
        if key in sharded:
            sharded[key] = apply_swiglu_sharded_factory(
                sharded[key],
                offsets,
                metadata.get("singleton_local_shards", False),
                tp_group=tp_group,
                dp_group=metadata["dp_cp_group"],
            )


def own_sharded_state(
    module: nn.Module,
    axes: Mapping[str, int],
    *,
    prefix: str,
    offsets: tuple[Any, ...],
    metadata: dict[str, Any] | None,
    tp_group: Any,
) -> dict[str, Any]:
    """Describe all of a module's state; `axes`: the dimension of each tensor that is sharded."""
    sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
        module.state_dict(keep_vars=True),
        prefix,
        dict(axes),
        offsets,
        tp_group=tp_group,
        dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
    )
    return sharded
