"""The Megatron functions that are called or overridden here take the arguments they are given."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import pytest
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.rerun_state_machine import RerunStateMachine
from megatron.core.tensor_parallel import checkpoint, copy_to_tensor_model_parallel_region
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker
from megatron.core.transformer.moe.moe_utils import router_gating_linear
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from megatron.core.transformer.utils import (
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)
from megatron.core.utils import get_batch_on_this_tp_rank
from megatron.training import checkpointing, pretrain, training

LEADING = [
    (get_transformer_layer_offset, "config vp_stage pp_rank"),
    (get_num_layers_to_build, "config vp_stage"),
    (TransformerLayer._forward_pre_mlp_layernorm, "self hidden_states"),
    (TopKRouter.forward, "self input padding_mask"),
    (
        TopKRouter.attach_and_log_load_balancing_loss,
        "self activation aux_loss_coeff aux_loss aux_loss_name reduce_group",
    ),
    (TopKRouter.apply_z_loss, "self logits"),
    (TopKRouter.get_aux_loss_coeff, "self aux_loss_type"),
    (router_gating_linear, "inp weight bias router_dtype"),
    (GPTModel.forward, "self input_ids position_ids attention_mask"),
    (
        DotProductAttention.forward,
        "self query key value attention_mask attn_mask_type attention_bias packed_seq_params",
    ),
    (checkpoint, "function distribute_saved_activations"),
    (copy_to_tensor_model_parallel_region, "input_ group"),
    (sharded_state_dict_default, "module prefix sharded_offsets metadata"),
    (
        apply_swiglu_sharded_factory,
        "original_sh_ten sharded_offsets singleton_local_shards",
    ),
    (
        make_sharded_tensors_for_checkpoint,
        "state_dict prefix tensor_parallel_layers_axis_map sharded_offsets",
    ),
    (
        pretrain,
        "cfg_container train_valid_test_dataset_provider model_type forward_step_func",
    ),
    (
        training.evaluate,
        "forward_step_func data_iterator model process_non_loss_data_func config",
    ),
    (training.get_optimizer_param_scheduler, "optimizer"),
    (training.get_megatron_optimizer_config, "args"),
    (training.disable_forward_pre_hook, "model_chunks optimizer param_sync"),
    (training.enable_forward_pre_hook, "model_chunks"),
    (training.force_param_sync, "model_chunks optimizer"),
    (training.should_disable_forward_pre_hook, "args"),
    (training.dummy_train_step, "data_iterator"),
    (RerunStateMachine.should_run_forward_backward, "self data_iterator"),
    (MoEMetricsTracker.report, "self loss_scale iteration writer wandb_writer"),
    (dist_checkpointing.save, "sharded_state_dict checkpoint_dir sharded_strategy"),
    (dist_checkpointing.load, "sharded_state_dict checkpoint_dir sharded_strategy"),
    (checkpointing.generate_state_dict, "args model optimizer opt_param_scheduler rng_state"),
    (checkpointing.get_rng_state, "ckpt_format tp_group pp_group"),
    (ChainedOptimizer.sharded_state_dict, "self model_sharded_state_dict is_loading kwargs"),
]
"""Passed by position, so a new parameter among them needs a look."""
NAMED = [
    (gather_from_sequence_parallel_region, "input_ group"),
    (apply_swiglu_sharded_factory, "tp_group dp_group"),
    (make_sharded_tensors_for_checkpoint, "tp_group dp_cp_group"),
    (GPTModel.forward, "labels"),
    (pretrain, "store"),
    (dist_checkpointing.save, "async_sharded_save content_metadata async_strategy"),
    (FileSystemWriterAsync.write_preloaded_data, "write_bucket results_queue"),
    (
        get_batch_on_this_tp_rank,
        "has_cu_seqlens is_hybrid_cp create_attention_mask_in_dataloader broadcast_src_rank "
        "broadcast_group cp_size tp_rank micro_batch_size seq_length mtp_on_this_rank "
        "pipeline_model_parallel_size is_pipeline_first_stage is_pipeline_last_stage",
    ),
]


def parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize(("function", "leading"), LEADING)
def test_what_is_given_by_place(function: Callable[..., Any], leading: str):
    assert parameters(function)[: len(leading.split())] == leading.split()


@pytest.mark.parametrize(("function", "names"), NAMED)
def test_what_is_given_by_name(function: Callable[..., Any], names: str):
    assert set(names.split()) <= set(parameters(function))


@pytest.mark.parametrize(
    ("submodules", "names"),
    [
        (
            TransformerLayerSubmodules,
            "input_layernorm self_attention self_attn_bda pre_mlp_layernorm mlp mlp_bda",
        ),
        (MoESubmodules, "experts router"),
    ],
)
def test_names_of_the_slots(submodules: type, names: str):
    assert set(names.split()) <= {field.name for field in dataclasses.fields(submodules)}
