"""Megatron in the test's own process: model parallel groups of one rank, layers, whole models."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_smlp.architectures import SMLPTransformerConfig

# Flags that Megatron requires before it looks at any of ours.
MINIMAL = """
    --mock-data --tokenizer-type NullTokenizer --vocab-size 100 --make-vocab-size-divisible-by 4
    --num-layers 4 --hidden-size 32 --ffn-hidden-size 64 --seq-length 16 --micro-batch-size 2
    --global-batch-size 2 --train-iters 4 --lr 1e-3 --attention-dropout 0 --hidden-dropout 0
    --eval-iters 1 --eval-interval 100 --num-workers 0 --strict-accounting
"""


def base_for(flags: str, base: str = MINIMAL) -> str:
    """Drop the size of MINIMAL's tokenizer if these flags name another one."""
    return base.replace("--vocab-size 100", "") if "--tokenizer-type" in flags else base


def prepare_megatron() -> None:
    """Replace in Megatron and torch what pretrain_smlp.py replaces, once per process."""
    from support.quick_megatron import quicken

    from megatron_smlp.megatron_patches import table
    from megatron_smlp.platform import cpu

    cpu.apply()
    table.apply()
    quicken()


def forget_router_losses() -> None:
    """Drop the losses that Megatron keeps by layer: the next model may have more layers."""
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker

    destroy_moe_metrics_tracker()


def forget_arguments() -> None:
    """Drop the namespace, tokenizer and counters that Megatron keeps after parsing."""
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
    from megatron.training.global_vars import destroy_global_vars

    forget_router_losses()
    destroy_global_vars()
    destroy_num_microbatches_calculator()


@contextlib.contextmanager
def pretrained(flags: str, *, base: str = MINIMAL) -> Iterator[None]:
    """Run all of pretrain_smlp.py in this process and forget it afterwards; errors propagate."""
    from support.runs import forget_run

    from pretrain_smlp import main

    prepare_megatron()
    try:
        main([*base_for(flags, base).split(), *flags.split()])
        yield
    finally:
        forget_run()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def layer_config(**changes: Any) -> SMLPTransformerConfig:
    """Return a small fp32 config for one layer, as parse_arguments would make it on a CPU."""
    values: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 24,
        "ffn_hidden_size": 96,
        "num_attention_heads": 4,
        "spatial_length": 16,
        "params_dtype": torch.float32,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "use_cpu_initialization": True,
        "transformer_impl": "local",
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": False,
        "persist_layer_norm": False,
    }
    return SMLPTransformerConfig(**(values | changes))


def build_model(args: Any) -> Any:
    """Build Megatron's GPTModel with the layers that these arguments name, in evaluation mode."""
    from megatron.training.models.base import compose_hooks
    from megatron.training.models.gpt import GPTModelBuilder

    from megatron_smlp.model import model_config

    groups = ProcessGroupCollection.use_mpu_process_groups()
    config = model_config(args)
    model = GPTModelBuilder(config).build_model(groups)
    return compose_hooks(config.pre_wrap_hooks)([model])[0].eval()
