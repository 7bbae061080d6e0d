"""The flags of the routers: what each rule settles of Megatron's, and what it refuses."""

from __future__ import annotations

import argparse
from typing import Any, get_args

from megatron_smlp.command_line import flag_of
from megatron_smlp.errors import UsageError
from megatron_smlp.options import EXPERTS_PER_TOKEN, TokenRouterName, prefix_length

ALLOWED = ", ".join(name for name in get_args(TokenRouterName) if name != "none")
WITH_CAPACITY = ("switch", "gshard")  # and with a balance loss
CAPACITIES = ("moe_train_capacity_factor", "moe_eval_capacity_factor")
DEFAULT_AUX_LOSS_COEFF = 0.01
# Megatron's top-k router reads these, ours do not.
OF_MEGATRONS_ROUTER = (
    "moe_router_load_balancing_type",
    "moe_router_score_function",
    "moe_router_enable_expert_bias",
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
OTHER_EXPERTS = {
    "moe_apply_probs_on_input": "the weight of an expert scales its output",
    "moe_latent_size": "experts read and write the hidden size",
    "moe_shared_expert_intermediate_size": "there are no shared experts",
    "moe_use_upcycling": "tools/convert_checkpoint.py --upcycle makes a dense model sparse",
}


# Flags of one rule.
OF_RULE = {
    "base": ("base_routing_input", "base_prices", "base_eval", "base_eval_both"),
    "gshard": ("gshard_second_expert",),
}


def settle_token_router(args: argparse.Namespace) -> None:
    """Check the router's flags, and set those of Megatron's that follow from the rule.

    Raises:
        UsageError: with flag, value, what is allowed, and what to do.
    """
    _check_presence(args)
    _check_rule(args)
    if args.token_router == "none":
        return
    _refuse_megatrons(args)
    _check_capacity(args)
    has_loss = args.token_router in WITH_CAPACITY
    if "moe_aux_loss_coeff" in args.explicit_flags and not has_loss:
        raise UsageError(
            f"--moe-aux-loss-coeff is for --token-router {' or '.join(WITH_CAPACITY)}, not "
            f"{args.token_router}, which has no balance loss: leave it out."
        )
    args.moe_router_topk = EXPERTS_PER_TOKEN[args.token_router]
    args.moe_router_load_balancing_type = "aux_loss" if has_loss else "none"
    args.moe_aux_loss_coeff = _aux_loss_coeff(args) if has_loss else 0.0
    args.moe_router_pre_softmax = True  # Megatron insists on it where a token visits one expert
    if "moe_token_drop_policy" not in args.explicit_flags:
        args.moe_token_drop_policy = (
            "position"  # by probability, later tokens push out earlier ones
        )


def check_prices(args: argparse.Namespace) -> None:
    """Refuse an evaluation by prices that the model does not have.

    Raises:
        UsageError: see the message.
    """
    for flag, remedy, by_prices in (
        ("--base-eval prices", "give --base-eval greedy", args.base_eval == "prices"),
        ("--base-eval-both", "leave it out", args.base_eval_both),
    ):
        if by_prices and args.base_prices == "none":
            raise UsageError(
                f"{flag} needs the prices of a training with --base-prices mean, and this model "
                f"has none: {remedy}."
            )


OF_PARTIAL = ("prefix_fraction", "partial_loss", "feature_aux_loss_coeff")


def settle_feature_router(args: argparse.Namespace) -> None:
    """Check the flags of the feature router of --architecture smlp.

    Raises:
        UsageError: with flag, value, what is allowed, and what to do.
    """
    chunks, experts = args.num_feature_chunks, args.num_feature_experts
    if args.feature_router != "partial":
        for name in OF_PARTIAL:
            if name in args.explicit_flags:
                raise UsageError(
                    f"{flag_of(name)} is for --feature-router partial, not {args.feature_router}: "
                    "leave it out."
                )
        if chunks not in (None, experts):
            raise UsageError(
                f"--num-feature-chunks {chunks} with --feature-router {args.feature_router} must "
                f"be --num-feature-experts {experts}: chunk i goes to expert i. Leave it out."
            )
        return
    prefix = prefix_length(args, seq_length=args.seq_length)
    if not (0 < args.prefix_fraction < 1 and 0 < prefix < args.seq_length):
        raise UsageError(
            f"--prefix-fraction {args.prefix_fraction:g} of --seq-length {args.seq_length} is a "
            f"prefix of {prefix} tokens: it must lie between 0 and 1 and leave at least one token "
            "on both sides."
        )
    if args.feature_aux_loss_coeff < 0:
        raise UsageError(
            f"--feature-aux-loss-coeff {args.feature_aux_loss_coeff:g} must be 0 or more: it is "
            "the weight of the balance loss."
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
    fewest = EXPERTS_PER_TOKEN[router]
    if experts < fewest:
        raise UsageError(
            f"--num-experts {experts} is too few for --token-router {router}: give {fewest} or "
            "more."
        )


def _check_rule(args: argparse.Namespace) -> None:
    for rule, names in OF_RULE.items():
        for name in names:
            if name in args.explicit_flags and args.token_router != rule:
                raise UsageError(
                    f"{flag_of(name)} is for --token-router {rule}, not {args.token_router}: "
                    "leave it out."
                )


def _refuse_megatrons(args: argparse.Namespace) -> None:
    for name in OF_MEGATRONS_ROUTER:
        if name in args.explicit_flags:
            raise UsageError(
                f"{flag_of(name)} is for Megatron's top-k router, not for --token-router "
                f"{args.token_router}: leave it out. Capacities are {flag_of(CAPACITIES[0])} and "
                f"{flag_of(CAPACITIES[1])}."
            )
    for name, here in OTHER_EXPERTS.items():
        if name in args.explicit_flags:
            raise UsageError(
                f"{flag_of(name)} is not available with --token-router {args.token_router}: "
                f"{here}. Leave it out."
            )
    if "moe_router_dtype" in args.explicit_flags and args.moe_router_dtype != "fp32":
        raise UsageError(
            f"--moe-router-dtype {args.moe_router_dtype}: routers compute in fp32 here. Give fp32, "
            "or leave it out."
        )
    topk = EXPERTS_PER_TOKEN[args.token_router]
    if "moe_router_topk" in args.explicit_flags and args.moe_router_topk != topk:
        raise UsageError(
            f"--moe-router-topk {args.moe_router_topk} contradicts --token-router "
            f"{args.token_router}, with which a token visits {topk}: leave it out."
        )


def _check_capacity(args: argparse.Namespace) -> None:
    for name in CAPACITIES:
        factor = getattr(args, name)
        if factor is None:
            continue
        if args.token_router not in WITH_CAPACITY:
            raise UsageError(
                f"{flag_of(name)} is for --token-router {' or '.join(WITH_CAPACITY)}, not "
                f"{args.token_router}, which drops nothing: leave it out."
            )
        if not factor > 0:
            raise UsageError(
                f"{flag_of(name)} {factor:g} must be over 0: 1 is an even share for each expert. "
                "Leave it out to drop nothing."
            )


def _aux_loss_coeff(args: argparse.Namespace) -> float:
    """Megatron reads a list of numbers, for its several losses; here there is one."""
    if "moe_aux_loss_coeff" not in args.explicit_flags:
        return DEFAULT_AUX_LOSS_COEFF
    given: Any = args.moe_aux_loss_coeff
    values = given if isinstance(given, list) else [given]
    if len(values) > 1:
        raise UsageError(
            f"--moe-aux-loss-coeff {' '.join(map(str, values))}: give one number, for the one "
            f"balance loss of --token-router {args.token_router}."
        )
    return float(values[0])
