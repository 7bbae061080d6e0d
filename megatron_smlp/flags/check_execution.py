"""Check how a step is executed: Muon, fp16, activation recomputation and CUDA graphs."""

from __future__ import annotations

import argparse
from importlib.util import find_spec

from megatron_smlp.command_line import flag_of
from megatron_smlp.errors import UsageError, require_package
from megatron_smlp.flags.check_model import slots_of
from megatron_smlp.systems import ARCHITECTURES, CHANNELS, MIXERS

CORE = "core_attn"
"""Megatron's name for the part of a token mixer that is recomputed, in mixers that have one."""
RECOMPUTED_BY_TRANSFORMER_ENGINE = frozenset({"layernorm", "moe_act", "mla_up_proj"})


WITHOUT_MUON = {
    "fp16": "Megatron 0.19 supports bf16 and fp32 only",
    "overlap_param_gather": "ranks update whole matrices, and send them once all are done",
    "dump_param_to_param_group_map": "Megatron 0.19 cannot dump its groups",
}


def check_muon(args: argparse.Namespace) -> None:
    """Refuse Muon without its package, and flags that it does not support or could not save."""
    if args.optimizer != "muon":
        return
    require_package(
        "emerging_optimizers", purpose="--optimizer muon", extra="'megatron-smlp[muon]'"
    )
    for name, why in WITHOUT_MUON.items():
        if getattr(args, name):
            raise UsageError(f"{flag_of(name)} with --optimizer muon: {why}. Leave it out.")
    if args.use_distributed_optimizer and not args.bf16:
        raise UsageError(
            "--use-distributed-optimizer with --optimizer muon needs --bf16: Megatron 0.19 has no "
            "fp32 state of whole matrices to shard over ranks. Give both, or leave it out."
        )
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    groups = args.num_query_groups if args.group_query_attention else tp
    if groups < tp and args.muon_split_qkv:
        raise UsageError(
            f"--optimizer muon with --num-query-groups {groups} and --tensor-model-parallel-size "
            f"{tp}: where a rank has part of a group, Megatron 0.19 silently updates queries, keys "
            "and values as one matrix, elsewhere separately. Lower the size, or give "
            "--muon-no-split-qkv, with which they are one matrix in every layout."
        )
    expert_tp, ep = args.expert_tensor_parallel_size or tp, args.expert_model_parallel_size
    if (
        args.use_distributed_optimizer
        and args.num_experts
        and args.world_size == tp * pp > expert_tp * ep * pp
    ):
        raise UsageError(
            f"--use-distributed-optimizer with --optimizer muon: on {args.world_size} processes, "
            f"--tensor-model-parallel-size {tp}, --expert-tensor-parallel-size {expert_tp} and "
            f"--expert-model-parallel-size {ep}, only experts have copies, and Megatron 0.19 "
            "counts each in the gradient norm. Leave --use-distributed-optimizer out."
        )
    if args.optimizer_checkpoint == "data_parallel":
        raise UsageError(
            "--optimizer-checkpoint data_parallel stores Adam's shards, but --optimizer muon has "
            "whole matrices: leave it out."
        )


def check_fp16(args: argparse.Namespace) -> None:
    """Refuse fp16 if the experts have an optimizer of their own."""
    expert, tensor = args.expert_model_parallel_size, args.tensor_model_parallel_size
    is_apart = expert > 1 or args.expert_tensor_parallel_size not in (None, tensor)
    if args.fp16 and args.num_experts and is_apart:
        raise UsageError(
            f"--fp16 with --expert-model-parallel-size {expert} and --expert-tensor-parallel-size "
            f"{args.expert_tensor_parallel_size or tensor}: Megatron 0.19 gives such experts their "
            "own loss scale, but scales by that of the rest. Give --bf16."
        )


def check_recomputing(args: argparse.Namespace) -> None:
    """Refuse to recompute modules that no layer has, or that need a missing Transformer Engine."""
    needing = RECOMPUTED_BY_TRANSFORMER_ENGINE.intersection(args.recompute_modules or ())
    if needing and find_spec("transformer_engine") is None:
        raise UsageError(
            f"--recompute-modules {' '.join(sorted(needing))}: recomputing this needs Transformer "
            "Engine, which is not installed. Give core_attn, mlp or moe, or leave it out."
        )
    is_selective = args.recompute_granularity == "selective"
    if not (is_selective or args.explicit_flags.get("recompute_activations")):
        return
    modules = args.recompute_modules or [CORE]
    slots = slots_of(args)
    channels = {layer.channel for layer in slots}
    is_there = {
        CORE: any(MIXERS[layer.mixer].recomputes for layer in slots),
        "mlp": "mlp" in channels,
        "moe": "token_moe" in channels,
        "shared_experts": bool(args.moe_shared_expert_intermediate_size),
    }
    if not any(is_there.get(module, True) for module in modules):
        default = "" if args.recompute_modules else " (the default)"
        raise UsageError(
            f"--recompute-modules {' '.join(modules)}{default}: no layer of this --architecture "
            f"{args.architecture} has that. Give --recompute-granularity full, or other modules."
        )


def check_cuda_graphs(args: argparse.Namespace) -> None:
    """Refuse CUDA graphs of what a replay would get wrong.

    A graph replays the kernels captured in training, with training's shapes, and none of the Python
    around them. Layers that route are left out of it (architectures.SlottedLayer).
    """
    if args.explicit_flags.get("cuda_graph_impl") in (None, "none"):
        return
    mixers, slots = ARCHITECTURES[args.architecture].mixers, slots_of(args)
    drops_attention = any(mixer.drops_attention for mixer in mixers)
    dropout = max(args.hidden_dropout, args.attention_dropout if drops_attention else 0.0)
    if (
        all(layer.routes for layer in slots)
        or any(mixer.plugin for mixer in mixers)
        or any(layer.channel in CHANNELS for layer in slots)
        or (dropout and args.eval_iters)
        or args.eval_micro_batch_size not in (None, args.micro_batch_size)
        or args.eval_tasks
    ):
        raise UsageError(
            f"--cuda-graph-impl {args.cuda_graph_impl} replays training's kernels, with their "
            "shapes and dropout, and no Python: it needs layers without routing or plugins, and "
            "evaluation without dropout (--hidden-dropout 0, --attention-dropout 0, or "
            "--eval-iters 0), at training's micro-batch size, without --eval-tasks. Leave it out, "
            "or change those."
        )
