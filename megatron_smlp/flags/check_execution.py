"""How a step is made: what is computed again or replayed, what Muon updates, and what cannot be."""

from __future__ import annotations

import argparse
from importlib.util import find_spec

from megatron_smlp.command_line import flag_of
from megatron_smlp.errors import UsageError, require_package
from megatron_smlp.flags.check_model import slots_of
from megatron_smlp.systems import ARCHITECTURES, MIXERS

CORE = "core_attn"
"""What Megatron calls the part of a token mixer that recomputes, where one does."""
RECOMPUTED_BY_TRANSFORMER_ENGINE = frozenset({"layernorm", "moe_act", "mla_up_proj"})


WITHOUT_MUON = {
    "fp16": "Megatron 0.19 has it in bf16 and in fp32",
    "overlap_param_gather": "a rank updates whole matrices, and sends them when all are done",
    "dump_param_to_param_group_map": "Megatron 0.19 writes none of its groups",
}


def check_muon(args: argparse.Namespace) -> None:
    """Refuse Muon where its package is not there, and what it does not do or could not save.

    Raises:
        UsageError: with the flag.
    """
    if args.optimizer != "muon":
        return
    require_package(
        "emerging_optimizers", purpose="--optimizer muon", extra="'megatron-smlp[muon]'"
    )
    for name, why in WITHOUT_MUON.items():
        if getattr(args, name):
            raise UsageError(f"{flag_of(name)} beside --optimizer muon: {why}. Leave it out.")
    if args.use_distributed_optimizer and not args.bf16:
        raise UsageError(
            "--use-distributed-optimizer beside --optimizer muon needs --bf16: Megatron 0.19 has "
            "no fp32 state of whole matrices to spread over ranks. Give both, or leave it out."
        )
    if args.optimizer_checkpoint == "data_parallel":
        raise UsageError(
            "--optimizer-checkpoint data_parallel is a format of Adam's parts, and --optimizer "
            "muon has whole matrices: leave it out."
        )


def check_recomputing(args: argparse.Namespace) -> None:
    """Refuse selective recomputation of what no layer has, or what needs Transformer Engine.

    Raises:
        UsageError: with the modules.
    """
    needing = RECOMPUTED_BY_TRANSFORMER_ENGINE.intersection(args.recompute_modules or ())
    if needing and find_spec("transformer_engine") is None:
        raise UsageError(
            f"--recompute-modules {' '.join(sorted(needing))}: Megatron recomputes this by "
            "Transformer Engine, which is not installed. Give core_attn, mlp or moe, or leave it "
            "out."
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
    if "layernorm" in modules and args.fp8 and not ARCHITECTURES[args.architecture].attends:
        raise UsageError(
            "--recompute-modules layernorm with FP8 is for attention, not for --architecture "
            f"{args.architecture}: give other modules."
        )


def check_cuda_graphs(args: argparse.Namespace) -> None:
    """Refuse graphs of what a replay would not do as it should.

    A graph replays kernels as they were captured, in training and in training's shapes, and not the
    Python beside them. Layers that route are left out of it (architectures.SlottedLayer).

    Raises:
        UsageError: with the reason.
    """
    if args.explicit_flags.get("cuda_graph_impl") in (None, "none"):
        return
    flag = f"--cuda-graph-impl {args.cuda_graph_impl}"
    mixer = MIXERS[ARCHITECTURES[args.architecture].mixer]
    dropout = max(args.hidden_dropout, args.attention_dropout if mixer.drops_attention else 0.0)
    if all(layer.routes for layer in slots_of(args)):
        raise UsageError(
            f"{flag} cannot capture layers that route, and every layer of this model would be "
            "such: a graph runs no Python, which hands routers their inputs. Leave it out."
        )
    if mixer.plugin:
        raise UsageError(
            f"{flag} is not tried with --architecture {args.architecture}, which is a plugin's: "
            "where a mixer's Python reads numbers, a replay would not. Leave it out."
        )
    if dropout and args.eval_iters:
        raise UsageError(
            f"{flag} with dropout replays it in evaluations: give --hidden-dropout 0 and "
            "--attention-dropout 0, or --eval-iters 0, or leave it out."
        )
    if args.eval_micro_batch_size not in (None, args.micro_batch_size):
        raise UsageError(
            f"{flag} captures micro-batches of --micro-batch-size {args.micro_batch_size}, and "
            f"--eval-micro-batch-size {args.eval_micro_batch_size} is another: leave one of them "
            "out."
        )
    if args.eval_tasks:
        raise UsageError(
            f"{flag} captures sequences of one length, and --eval-tasks scores others: leave one "
            "of them out; tools/evaluate.py scores checkpoints."
        )
