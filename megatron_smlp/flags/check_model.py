"""Check that shapes and layout describe a possible model, before anything is built."""

from __future__ import annotations

import argparse
from typing import Any

from megatron_smlp.command_line import flag_of
from megatron_smlp.errors import UsageError
from megatron_smlp.systems import ARCHITECTURES, CHANNELS, LayerSlots, layer_slots, load


def check_model(args: argparse.Namespace) -> None:
    """Check the sizes of the layers, and how they are sharded over ranks."""
    for name in ("num_layers", "hidden_size", "seq_length", "micro_batch_size"):
        if getattr(args, name) is None:
            raise UsageError(f"{flag_of(name)} is missing: give it, or a --config that has it.")
    kind = ARCHITECTURES[args.architecture]
    if kind.attends:
        check_attention(args)
    for mixer in kind.mixers:
        _call(mixer.check, args, *([mixer.plugin] if mixer.plugin else []))
    if args.context_parallel_size > 1:
        # Mixers over positions were refused above, by their own check and with their own reason.
        raise UsageError(
            f"--context-parallel-size {args.context_parallel_size} is not available: Megatron "
            "splits sequences for Transformer Engine's attention only; losses by position, task "
            "scores and the causality check read whole ones. Leave it out; "
            "--tensor-model-parallel-size with --sequence-parallel shards activations instead."
        )
    if args.input_projection == "minhash":
        _call("megatron_smlp.layers.minhash:check_flags", args)
    if kind.sparse_mixer:
        check_sparse(args)
    check_experts(args)
    check_channels(args)
    check_mup(args)


def slots_of(args: argparse.Namespace) -> list[LayerSlots]:
    """Return the slots of each layer that these flags build."""
    return layer_slots(args, args, num_experts=args.num_experts)


def check_attention(args: argparse.Namespace) -> None:
    """Check the number of attention heads."""
    heads, tp = args.num_attention_heads, args.tensor_model_parallel_size
    if not heads or args.hidden_size % heads:
        raise UsageError(
            f"--num-attention-heads {heads} does not divide --hidden-size {args.hidden_size}: "
            "choose a divisor."
        )
    if heads % tp:
        raise UsageError(
            f"--tensor-model-parallel-size {tp} does not divide --num-attention-heads {heads}: "
            "choose a divisor."
        )
    if args.group_query_attention and heads % (args.num_query_groups or 1):
        raise UsageError(
            f"--num-query-groups {args.num_query_groups} does not divide --num-attention-heads "
            f"{heads}: choose a divisor."
        )
    width = args.kv_channels or args.hidden_size // heads
    if args.position_embedding_type == "rope" and width % 2:
        raise UsageError(
            f"--position-embedding-type rope turns pairs of features, but a head has {width}: "
            "choose another --num-attention-heads, or an even --kv-channels."
        )


def check_channels(args: argparse.Namespace) -> None:
    """Check that tensor parallelism can shard the layers' FFNs and plugins' channel mixers."""
    width, tp = args.ffn_hidden_size, args.tensor_model_parallel_size
    if width is None:
        return  # Megatron's default, which follows from --hidden-size
    for name in {slots.channel for slots in slots_of(args)}:
        if name == "mlp" and width % tp:
            raise UsageError(
                f"--tensor-model-parallel-size {tp} does not divide --ffn-hidden-size {width}: "
                "choose a divisor, or another --ffn-hidden-size."
            )
        if name in CHANNELS:
            _call("megatron_smlp.layers.hosted:check_flags", args, CHANNELS[name])


def check_mup(args: argparse.Namespace) -> None:
    """Check that muP's rules cover every weight of the model, and that their base width is given.

    The rules assume a fan-in that grows with the width, which T x T matrices do not have. They also
    leave out routers and experts, which see a share of the tokens, and rates other than Adam's.
    """
    if not args.use_mup:
        return
    is_dense = all(slots.channel == "mlp" for slots in slots_of(args))
    attends = all(mixer.attends for mixer in ARCHITECTURES[args.architecture].mixers)
    others = (args.optimizer, args.decoupled_lr, args.input_projection)
    if not (is_dense and attends and others == ("adam", None, "embedding")):
        raise UsageError(
            "--use-mup needs a dense Transformer with an embedding table, and Adam without "
            "--decoupled-lr: its source has no rules for others. Leave it out."
        )
    if not args.mup_base_hidden_size:
        raise UsageError(
            "--use-mup without --mup-base-hidden-size: give the width at which the rates were "
            "tuned, and its heads' width by --mup-base-head-dim."
        )


def _call(check: str | None, *args: Any) -> None:
    if check is None:
        return
    try:
        load(check)(*args)
    except ValueError as error:
        raise UsageError(str(error)) from error


def check_sparse(args: argparse.Namespace) -> None:
    """Check how many layers of sMLP are dense, and the number of feature experts in the others."""
    if not 0 <= args.num_dense_layers <= args.num_layers:
        raise UsageError(
            f"--num-dense-layers {args.num_dense_layers} must lie between 0 and --num-layers "
            f"{args.num_layers}: it says how many of them are dense."
        )
    if args.feature_router != "none" and args.num_feature_experts < 2:
        raise UsageError(
            f"--num-feature-experts {args.num_feature_experts} with --feature-router "
            f"{args.feature_router} is not a mixture: give 2 or more, or --feature-router none."
        )


def check_experts(args: argparse.Namespace) -> None:
    """Check the number of token experts, and which layers have them."""
    experts, ep = args.num_experts, args.expert_model_parallel_size
    if experts is None:
        if ep > 1:
            raise UsageError(
                f"--expert-model-parallel-size {ep} without --num-experts has nothing to shard. "
                "Give --num-experts, or leave it out."
            )
        return
    if experts < 1 or experts % ep:
        raise UsageError(
            f"--num-experts {experts} is not a multiple of --expert-model-parallel-size {ep}: "
            "choose a multiple."
        )
    freq, layers = args.moe_layer_freq, args.num_layers
    if isinstance(freq, int):
        is_possible, is_default = freq >= 1, freq == 1
    else:
        is_possible, is_default = len(freq) == layers and set(freq) <= {0, 1}, all(freq)
    if not is_possible:
        raise UsageError(
            f"--moe-layer-freq {freq}: give 1 or more, or a list with 0 or 1 for each of the "
            f"--num-layers {layers} layers, such as [0,1]*{layers // 2 or 1}."
        )
    by_number = ARCHITECTURES[args.architecture].sparse_mixer
    if by_number and not is_default:
        raise UsageError(
            f"--moe-layer-freq {freq} has no effect with --architecture {args.architecture}, where "
            "--num-dense-layers sets the first expert layer: leave it out."
        )
    if not any(slots.channel == "token_moe" for slots in slots_of(args)):
        where = f"--num-dense-layers {layers}" if by_number else f"--moe-layer-freq {freq}"
        raise UsageError(
            f"--num-experts {experts}, but {where} leaves no layer with experts: change that, or "
            "leave out --num-experts and --token-router."
        )
