"""What the token mixers share: their two projections, and the check of their sizes.

A mixer with projections reads D features of each token, works on a width of its own that tensor
parallelism shards, and writes D features; the two linear layers are Megatron's, or Transformer
Engine's.
"""

from __future__ import annotations

from typing import Any

from megatron.core.models.backends import BackendSpecProvider
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn


def await_parameters(module: nn.Module) -> None:
    """Wait for parameters that are read without calling their module.

    Under --overlap-param-gather they are in flight from other ranks until the module's forward
    pre-hook has waited for them.
    """
    for hook in module._forward_pre_hooks.values():
        hook(module, ())


# Transformer Engine's communication overlap identifies layers by name, each with a buffer for
# [T, B, D]: "fc1" gathers its input, "fc2" scatters its output.
IN, OUT = "fc1", "fc2"


def two_projections(backend: BackendSpecProvider) -> MLPSubmodules:
    """Return the classes of the two linear layers: the input's and the output's."""
    return MLPSubmodules(
        linear_fc1=backend.column_parallel_linear(), linear_fc2=backend.row_parallel_linear()
    )


def column_projection(
    layer: Any, config: TransformerConfig, width: int, *, tp_group: Any, **stride: int
) -> Any:
    """Build the projection D -> `width`, sharded over the ranks.

    Args:
        layer: its spec or class.
        stride: how many projections it holds side by side, each of them sharded by itself.
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
        tp_comm_buffer_name=IN,
        tp_group=tp_group,
        **stride,
    )


def row_projection(layer: Any, config: TransformerConfig, width: int, *, tp_group: Any) -> Any:
    """Build the projection `width` -> D; it returns its bias separately, for the slot to add."""
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
        tp_comm_buffer_name=OUT,
        tp_group=tp_group,
    )


def check_heads(
    args: Any,
    flag: str,
    num_heads: int,
    *,
    width: float,
    width_flag: str,
    mixer: str,
    width_name: str = "",
    splits_one: bool = True,
) -> None:
    """Check that heads, their total width and the parallel layout fit together.

    Args:
        args: Megatron's namespace or config.
        flag: the flag that set `num_heads`; like the other names, for the messages.
        width_name: defaults to `width_flag` and the width.
        splits_one: whether a single head is split over all ranks.

    Raises:
        ValueError: they do not.
    """
    width_name = width_name or f"{width_flag} {width}"
    tp, cp = args.tensor_model_parallel_size, args.context_parallel_size
    if num_heads < 1 or width % num_heads:
        raise ValueError(
            f"{flag} {num_heads} does not divide {width_name}: choose a divisor, or another "
            f"{width_flag}."
        )
    if num_heads % tp and not (splits_one and num_heads == 1):
        other = "a single head, which is split over all ranks" if splits_one else "leave it out"
        raise ValueError(
            f"--tensor-model-parallel-size {tp} does not divide {flag} {num_heads}: choose a "
            f"divisor, or {other}."
        )
    if width % tp:
        raise ValueError(
            f"--tensor-model-parallel-size {tp} does not divide {width_name}: choose a divisor."
        )
    if cp > 1:
        raise ValueError(
            f"--context-parallel-size {cp} is not available with {mixer}, which mixes all tokens "
            "of a sequence, so that they must be on one rank. Leave it out; "
            "--tensor-model-parallel-size shards the features instead."
        )
