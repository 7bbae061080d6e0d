"""The flags of the routers: what each rule needs, and which of Megatron's it refuses."""

from __future__ import annotations

import argparse
from typing import Any

from megatron_smlp.command_line import flag_of
from megatron_smlp.errors import UsageError
from megatron_smlp.flags.unused_flags import one_of, refuse_unless
from megatron_smlp.partial_prediction import prefix_length
from megatron_smlp.systems import LIMITED, SCORING, TOKEN_ROUTERS, TOP_K, WITH_BALANCE_LOSS

ALLOWED = ", ".join(TOKEN_ROUTERS)
CAPACITIES = ("moe_train_capacity_factor", "moe_eval_capacity_factor")
# What --token-router topk passes on to Megatron's router.
TOP_K_FLAGS = (
    "moe_router_load_balancing_type",
    "moe_router_score_function",
    "moe_router_enable_expert_bias",
    "moe_router_bias_update_rate",
    "moe_router_topk_scaling_factor",
    "moe_shared_expert_intermediate_size",
    "moe_shared_expert_overlap",
)
BALANCING = ("aux_loss", "none")
SCORES = ("softmax", "sigmoid")
# Megatron's top-k router reads these, ours do not.
MEGATRON_ROUTER_FLAGS = (
    "moe_router_load_balancing_type",
    "moe_router_score_function",
    "moe_router_enable_expert_bias",
    "moe_router_pre_softmax",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_router_topk_scaling_factor",
    "moe_router_force_load_balancing",
    "moe_router_force_biased",
    "moe_router_fusion",
    "moe_router_bias_update_rate",
    "moe_router_quantile_balancing_ema",
    "moe_router_padding_for_fp8",
    "moe_router_padding_for_quantization",
    "moe_enable_routing_replay",
    "moe_input_jitter_eps",
    "moe_expert_capacity_factor",
    "moe_pad_expert_input_to_capacity",
)
# Megatron would build other experts with these, or put them to another use.
EXPERT_FLAGS = {
    "moe_apply_probs_on_input": "the weight of an expert scales its output",
    "moe_latent_size": "experts read and write the hidden size",
    "moe_shared_expert_intermediate_size": "there are no shared experts",
    "moe_shared_expert_overlap": "there are no shared experts",
    "moe_shared_expert_gate": "a shared expert has weight 1",
    "mlp_chunks_for_training": "it routes all tokens of a micro-batch at once",
    "moe_use_upcycling": "tools/convert_checkpoint.py --upcycle makes a dense model sparse",
}


def check_token_router(args: argparse.Namespace) -> None:
    """Check the router's flags, and those of Megatron's that follow from the rule.

    Raises:
        UsageError: with flag, value, what is allowed, and what to do.
    """
    _check_presence(args)
    refuse_unless(args, "token_router")
    if args.token_router == "none":
        _refuse_experts(args)
        return
    _refuse_megatrons(args)
    if args.token_router in TOP_K:
        _check_top_k(args)
    _check_capacity(args)
    _check_aux_loss_coeff(args)
    _check_prices(args)
    _check_unread(args)


def _check_aux_loss_coeff(args: argparse.Namespace) -> None:
    given: Any = args.explicit_flags.get("moe_aux_loss_coeff")
    if given in (None, 0, [0]):
        return
    if args.token_router not in WITH_BALANCE_LOSS:
        raise UsageError(
            f"--moe-aux-loss-coeff is for --token-router {one_of(WITH_BALANCE_LOSS)}, not "
            f"{args.token_router}, which has no balance loss: leave it out."
        )
    if args.moe_router_load_balancing_type == "none":
        has_bias = args.moe_router_enable_expert_bias
        why = (
            "--moe-router-enable-expert-bias balances in its place" if has_bias else "there is none"
        )
        raise UsageError(
            f"--moe-aux-loss-coeff {given} has no loss to weigh: {why}. Give "
            "--moe-router-load-balancing-type aux_loss, or leave it out."
        )
    if isinstance(given, list) and len(given) > 1:
        raise UsageError(
            f"--moe-aux-loss-coeff {' '.join(map(str, given))}: give one number, for the one "
            f"balance loss of --token-router {args.token_router}."
        )


def _check_unread(args: argparse.Namespace) -> None:
    """Refuse what this rule would leave unread."""
    given = args.explicit_flags
    if given.get("moe_z_loss_coeff") and args.token_router not in SCORING:
        raise UsageError(
            f"--moe-z-loss-coeff {given['moe_z_loss_coeff']} has no scores to keep small: "
            f"--token-router {args.token_router} has none. Leave it out."
        )
    if given.get("moe_token_drop_policy") and args.token_router not in LIMITED:
        raise UsageError(
            f"--moe-token-drop-policy {given['moe_token_drop_policy']} is for --token-router "
            f"{one_of(LIMITED)}, and {args.token_router} drops no tokens: leave it out."
        )


def _check_prices(args: argparse.Namespace) -> None:
    """Refuse what needs prices that the model does not have, and another way than by them."""
    for flag, remedy, by_prices in (
        ("--base-eval prices", "give --base-eval greedy", args.base_eval == "prices"),
        ("--base-eval-both", "leave it out", args.base_eval_both),
        ("--base-gate price", "give --base-gate score", args.base_gate == "price"),
    ):
        if by_prices and args.base_prices == "none":
            raise UsageError(
                f"{flag} needs the prices of a training with --base-prices mean, and this model "
                f"has none: {remedy}."
            )
    is_greedy = args.explicit_flags.get("base_eval") == "greedy"
    if args.base_gate == "price" and (is_greedy or args.base_eval_both):
        flag = "--base-eval greedy" if is_greedy else "--base-eval-both"
        raise UsageError(f"{flag}: --base-gate price evaluates by prices only. Leave it out.")


def check_feature_router(args: argparse.Namespace) -> None:
    """Check the flags of the feature router of --architecture smlp.

    Raises:
        UsageError: with flag, value, what is allowed, and what to do.
    """
    refuse_unless(args, "feature_router")
    chunks, experts = args.num_feature_chunks, args.num_feature_experts
    if args.feature_router != "partial":
        if chunks not in (None, experts):
            raise UsageError(
                f"--num-feature-chunks {chunks} with --feature-router {args.feature_router} must "
                f"be --num-feature-experts {experts}: chunk i goes to expert i. Leave it out."
            )
        return
    if args.calculate_per_token_loss and args.partial_loss == "suffix":
        raise UsageError(
            "--calculate-per-token-loss with --partial-loss suffix would divide the loss by the "
            "tokens behind the prefix, and balance losses by all: leave it out, or give "
            "--partial-loss all."
        )
    prefix = prefix_length(args, seq_length=args.seq_length)
    if not (0 < args.prefix_fraction < 1 and 0 < prefix < args.seq_length):
        raise UsageError(
            f"--prefix-fraction {args.prefix_fraction:g} of --seq-length {args.seq_length} is a "
            f"prefix of {prefix} tokens: it must lie between 0 and 1 and leave at least one token "
            "on both sides."
        )


def _check_presence(args: argparse.Namespace) -> None:
    router, experts = args.token_router, args.num_experts
    if router == "none" and experts is not None:
        raise UsageError(
            f"--num-experts {experts} without --token-router: choose one of {ALLOWED}, or leave "
            "--num-experts out."
        )
    if router == "none":
        return
    if experts is None:
        raise UsageError(
            f"--token-router {router} without --num-experts: give the number of experts, or "
            "--token-router none."
        )
    fewest = max(1, args.moe_router_topk)
    if experts < fewest:
        raise UsageError(
            f"--num-experts {experts} is too few for --token-router {router}: give {fewest} or "
            "more."
        )


def _refuse_experts(args: argparse.Namespace) -> None:
    """Refuse Megatron's flags of experts, with which a dense model would be trained in silence."""
    for name, value in args.explicit_flags.items():
        # None, False and "none" are what a configuration takes back what it includes by.
        if name.startswith("moe_") and value not in (None, False, "none"):
            said = flag_of(name) if value is True else f"{flag_of(name)} {value}"
            raise UsageError(
                f"{said} is for token experts, and there are none without --token-router: give "
                f"--token-router ({one_of(tuple(TOKEN_ROUTERS))}) and --num-experts, or leave it "
                "out."
            )


def _check_top_k(args: argparse.Namespace) -> None:
    if args.moe_router_topk < 1:
        raise UsageError(
            f"--moe-router-topk {args.moe_router_topk}: give how many of the --num-experts "
            f"{args.num_experts} a token visits, 1 or more."
        )
    for name, allowed in (
        ("moe_router_load_balancing_type", BALANCING),
        ("moe_router_score_function", SCORES),
    ):
        value = getattr(args, name)
        values = value if isinstance(value, list) else [value]
        if len(values) != 1 or values[0] not in allowed:
            raise UsageError(
                f"{flag_of(name)} {' '.join(map(str, values))} is not available with "
                f"--token-router {args.token_router}: give {one_of(allowed)}."
            )
    if args.moe_router_enable_expert_bias and args.moe_router_score_function != "sigmoid":
        raise UsageError(
            "--moe-router-enable-expert-bias is for --moe-router-score-function sigmoid, not "
            f"{args.moe_router_score_function}: give that, or leave it out."
        )
    rate = args.explicit_flags.get("moe_router_bias_update_rate")
    if rate is not None and not args.moe_router_enable_expert_bias:
        raise UsageError(
            f"--moe-router-bias-update-rate {rate:g} is for --moe-router-enable-expert-bias: give "
            "that too, or leave it out."
        )
    for name in ("moe_router_topk_scaling_factor", "moe_shared_expert_intermediate_size"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise UsageError(f"{flag_of(name)} {value:g}: must be over 0, or left out.")


def _refuse_megatrons(args: argparse.Namespace) -> None:
    passed_on = TOP_K_FLAGS if args.token_router in TOP_K else ()
    for name in MEGATRON_ROUTER_FLAGS:
        if name in args.explicit_flags and name not in passed_on:
            raise UsageError(
                f"{flag_of(name)} is for Megatron's own routing, not for --token-router "
                f"{args.token_router}: leave it out. Capacities are {flag_of(CAPACITIES[0])} and "
                f"{flag_of(CAPACITIES[1])}."
            )
    for name, here in EXPERT_FLAGS.items():
        if name in args.explicit_flags and name not in passed_on:
            raise UsageError(
                f"{flag_of(name)} is not available with --token-router {args.token_router}: "
                f"{here}. Leave it out."
            )
    if "moe_router_dtype" in args.explicit_flags and args.moe_router_dtype != "fp32":
        raise UsageError(
            f"--moe-router-dtype {args.moe_router_dtype}: routers compute in fp32 here. Give fp32, "
            "or leave it out."
        )
    topk = args.moe_router_topk
    given = args.explicit_flags.get("moe_router_topk", topk)
    if given != topk:
        raise UsageError(
            f"--moe-router-topk {given} contradicts --token-router "
            f"{args.token_router}, with which a token visits {topk}: leave it out."
        )


def _check_capacity(args: argparse.Namespace) -> None:
    for name in CAPACITIES:
        factor = getattr(args, name)
        if factor is not None and not factor > 0:
            raise UsageError(
                f"{flag_of(name)} {factor:g} must be over 0: 1 is an even share for each expert. "
                "Leave it out to drop nothing."
            )
