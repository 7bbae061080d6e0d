"""Check the routers' flags: what each rule needs, and which numbers it can use."""

from __future__ import annotations

import argparse
from typing import Any

from megatron_smlp.command_line import flag_of
from megatron_smlp.errors import UsageError
from megatron_smlp.flags.check_needs import one_of, refuse_unless, said
from megatron_smlp.partial_prediction import prefix_length
from megatron_smlp.systems import BY_PREFIX, TOKEN_ROUTERS

CAPACITIES = ("moe_train_capacity_factor", "moe_eval_capacity_factor")


def check_token_router(args: argparse.Namespace) -> None:
    """Check the token router's flags, and the Megatron flags that follow from its rule."""
    if args.token_router == "none":
        _refuse_experts(args)
    refuse_unless(args, "token_router")
    if args.token_router == "none":
        return
    _check_experts_per_token(args)
    _check_numbers(args)
    _check_groups(args)
    _check_prices(args)


def _check_groups(args: argparse.Namespace) -> None:
    """Refuse expert groups that leave no valid choice; Megatron refuses other bad groups itself."""
    groups, chosen = args.moe_router_num_groups, args.moe_router_group_topk
    topk = args.moe_router_topk
    if groups and chosen and (topk % chosen or topk > chosen * (args.num_experts // groups)):
        raise UsageError(
            f"--moe-router-group-topk {chosen} of --moe-router-num-groups {groups}: it must divide "
            f"--moe-router-topk {topk}, and the chosen groups must have as many experts."
        )


def _check_prices(args: argparse.Namespace) -> None:
    """Refuse greedy evaluation with --base-gate price, which evaluates by prices."""
    if args.base_gate == "price" and args.explicit_flags.get("base_eval") == "greedy":
        raise UsageError(
            "--base-eval greedy: --base-gate price evaluates by prices only. Leave it out."
        )


def check_feature_router(args: argparse.Namespace) -> None:
    """Check the flags of the feature router of --architecture smlp."""
    refuse_unless(args, "feature_router")
    chunks, experts = args.num_feature_chunks, args.num_feature_experts
    if args.feature_router not in BY_PREFIX:
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


def _refuse_experts(args: argparse.Namespace) -> None:
    """Refuse Megatron's expert flags without a router: a dense model would silently be trained."""
    for name, value in sorted(args.explicit_flags.items()):
        # None, False and "none" are how a config file undoes what it includes.
        is_of_experts = name == "num_experts" or name.startswith("moe_")
        if is_of_experts and value not in (None, False, "none"):
            raise UsageError(
                f"{said(args, name)} has no effect on a model without --token-router: give "
                f"--token-router ({one_of(tuple(TOKEN_ROUTERS))}) and --num-experts, or leave it "
                "out."
            )


def _check_experts_per_token(args: argparse.Namespace) -> None:
    router, experts, topk = args.token_router, args.num_experts, args.moe_router_topk
    if experts is None:
        raise UsageError(
            f"--token-router {router} without --num-experts: give the number of experts, or "
            "--token-router none."
        )
    if experts < topk:
        raise UsageError(
            f"--num-experts {experts} is too few for --token-router {router}: give {topk} or more."
        )
    given = args.explicit_flags.get("moe_router_topk", topk)
    if given != topk:
        raise UsageError(
            f"--moe-router-topk {given} contradicts --token-router {router}, which uses {topk} per "
            "token: leave it out."
        )


def _check_numbers(args: argparse.Namespace) -> None:
    for name in (*CAPACITIES, "moe_router_topk_scaling_factor"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise UsageError(f"{flag_of(name)} {value:g}: must be over 0 or omitted.")
    given: Any = args.explicit_flags.get("moe_aux_loss_coeff")
    if isinstance(given, list) and len(given) > 1:
        raise UsageError(
            f"{said(args, 'moe_aux_loss_coeff')}: give one number, for the one balance loss of "
            f"--token-router {args.token_router}."
        )
