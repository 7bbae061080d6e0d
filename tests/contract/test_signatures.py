"""Megatron's functions that are called or overridden here take these arguments by position.

A name that is gone raises where it is given; a new parameter before others would not.
"""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
from megatron.core import dist_checkpointing
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.tensor_parallel import checkpoint, copy_to_tensor_model_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker
from megatron.core.transformer.moe.moe_utils import router_gating_linear
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import (
    get_transformer_layer_offset,
)
from megatron.core.transformer.utils import (
    make_sharded_tensors_for_checkpoint,
)
from megatron.training import checkpointing, training

LEADING = [
    (get_transformer_layer_offset, "config vp_stage pp_rank"),
    (get_num_layers_to_build, "config vp_stage"),
    (TopKRouter.forward, "self input padding_mask"),
    (
        TopKRouter.attach_and_log_load_balancing_loss,
        "self activation aux_loss_coeff aux_loss aux_loss_name reduce_group",
    ),
    (router_gating_linear, "inp weight bias router_dtype"),
    (GPTModel.forward, "self input_ids position_ids attention_mask"),
    (
        DotProductAttention.forward,
        "self query key value attention_mask attn_mask_type attention_bias packed_seq_params",
    ),
    (checkpoint, "function distribute_saved_activations"),
    (copy_to_tensor_model_parallel_region, "input_ group"),
    (
        apply_swiglu_sharded_factory,
        "original_sh_ten sharded_offsets singleton_local_shards",
    ),
    (
        make_sharded_tensors_for_checkpoint,
        "state_dict prefix tensor_parallel_layers_axis_map sharded_offsets",
    ),
    (
        training.evaluate,
        "forward_step_func data_iterator model process_non_loss_data_func config",
    ),
    (MoEMetricsTracker.report, "self loss_scale iteration writer wandb_writer"),
    (dist_checkpointing.save, "sharded_state_dict checkpoint_dir sharded_strategy"),
    (dist_checkpointing.load, "sharded_state_dict checkpoint_dir sharded_strategy"),
    (checkpointing.generate_state_dict, "args model optimizer opt_param_scheduler rng_state"),
    (checkpointing.get_rng_state, "ckpt_format tp_group pp_group"),
    (ChainedOptimizer.sharded_state_dict, "self model_sharded_state_dict is_loading kwargs"),
]
"""Passed by position, so a new parameter among them needs a look."""


def parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize(("function", "leading"), LEADING)
def test_what_is_given_by_place(function: Callable[..., Any], leading: str):
    assert parameters(function)[: len(leading.split())] == leading.split()
