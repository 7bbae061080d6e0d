"""What a checkpoint says of the model in it, and whether a run may go on from it.

`model.json` lies in each `iter_*` folder, beside Megatron's own files: the flags that make the
model, as plain JSON, so that they can be read without torch and without unpickling anything.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_smlp.checkpoints.folders import (
    MODEL,
    is_checkpoint_folder,
    iteration_folder,
    iteration_of,
    latest_iteration,
    release_folder,
)
from megatron_smlp.command_line import flag_of
from megatron_smlp.durable import write_durably
from megatron_smlp.errors import UsageError
from megatron_smlp.options import ModelOptions, model_option_names

# Megatron's flags that make another function of the same weights, and their defaults.
OTHER_FUNCTIONS: dict[str, Any] = {
    "openai_gelu": False,
    "squared_relu": False,
    "quick_geglu": False,
    "glu_linear_offset": 0.0,
    "activation_func_clamp_value": None,
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "rotary_seq_len_interpolation_factor": None,
    "use_rope_scaling": False,
    "rope_scaling_factor": 8.0,
}
# These, and those that shape the parameters; our own flags come from ModelOptions.
MEGATRON_MODEL_FLAGS = (
    *OTHER_FUNCTIONS,
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "kv_channels",
    "group_query_attention",
    "num_query_groups",
    "seq_length",
    "max_position_embeddings",
    "position_embedding_type",
    "num_experts",
    "moe_ffn_hidden_size",
    "moe_layer_freq",
    "moe_router_topk",
    "moe_aux_loss_coeff",
    "moe_token_drop_policy",
    "normalization",
    "layernorm_epsilon",
    "add_bias_linear",
    "swiglu",
    "untie_embeddings_and_output_weights",
    "padded_vocab_size",
)

# Recorded for whoever exports the model, but free to change from run to run.
MAY_CHANGE = (
    "base_eval",
    "gshard_second_expert",
    "partial_loss",
    "feature_aux_loss_coeff",
    "hash_seed",
    "hash_table",
    "moe_train_capacity_factor",
    "moe_eval_capacity_factor",
    "moe_aux_loss_coeff",
    "moe_token_drop_policy",
)

# What checkpoints that are older than a flag do not say.
OLDER_THAN: dict[str, Any] = {**OTHER_FUNCTIONS, "toeplitz": False}
# The same of a rule of the token router; flags of other rules have their defaults.
OLDER_ROUTERS: dict[str, dict[str, Any]] = {
    "base": {"base_routing_input": "norm", "base_prices": "none"},
    "gshard": {"gshard_second_expert": "raw"},
}

# Padding of the vocabulary grows with the tensor parallel size; Megatron loads across it.
LAYOUT_DEPENDENT = ("padded_vocab_size",)


def model_flags(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that make the model what it is, by argparse destination."""
    names = (*model_option_names(), *MEGATRON_MODEL_FLAGS)
    from megatron.training import get_tokenizer

    flags = {name: getattr(args, name) for name in names}
    flags["vocab_size"] = get_tokenizer().vocab_size
    if not args.group_query_attention:
        flags["num_query_groups"] = None  # without it Megatron fills in one number or another
    return flags


def write_model_flags(args: argparse.Namespace, folder: Path) -> None:
    """Put model.json into the folder of a checkpoint.

    Raises:
        OSError: it cannot be written.
    """
    write_durably(folder / MODEL, json.dumps(model_flags(args), indent=1) + "\n")


def read_model_flags(checkpoint: str | Path, iteration: int | None = None) -> dict[str, Any] | None:
    """The flags of a checkpoint in a run's folder; None where it was not written by us.

    A damaged file is no error here: whoever loads the checkpoint compares its checksums before.

    Args:
        iteration: the one to read; left out: the newest.
    """
    iteration = latest_iteration(checkpoint) if iteration is None else iteration
    folder = release_folder(checkpoint)
    if iteration is not None:
        folder = iteration_folder(checkpoint, iteration)
    if folder is None:
        return None
    try:
        text = (folder / MODEL).read_text(encoding="utf-8")
        flags: dict[str, Any] = json.loads(text)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        return None
    return with_older_flags(flags) if isinstance(flags, dict) else None


def with_older_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    """What was recorded, and what a checkpoint that does not record a flag has of it."""
    of_rule = OLDER_ROUTERS.get(flags.get("token_router", "none"), {})
    of_others = {name: getattr(ModelOptions, name) for name in model_option_names()}
    return {**of_others, **OLDER_THAN, **of_rule, **flags}


def keep_router(args: argparse.Namespace) -> None:
    """Route as the checkpoint to be loaded does, wherever the command line does not say how."""
    recorded = (read_model_flags(args.load, args.ckpt_step) if args.load else None) or {}
    args.kept_flags = []
    for name in OLDER_ROUTERS.get(args.token_router, {}):
        there = recorded.get(name, getattr(args, name))
        if name not in args.explicit_flags and there != getattr(args, name):
            setattr(args, name, there)
            args.kept_flags.append(f"{flag_of(name)} {there}")


def settle_load(args: argparse.Namespace) -> None:
    """What is loaded: what --load says, or what an earlier start left in the --save folder.

    A --load that holds no checkpoint is a mistake: Megatron would start from scratch. Where it is
    the --save folder too, as launchers give it, this is the first start.

    Raises:
        UsageError: there is nothing to load where something is asked for.
    """
    if args.load is None:
        if args.save and not args.no_resume and _holds_checkpoint(args.save):
            args.load = args.save
    elif not _holds_checkpoint(args.load) and not args.pretrained_checkpoint:
        if not (args.save and Path(args.load).resolve() == Path(args.save).resolve()):
            raise UsageError(_nothing_in(Path(args.load)))
        args.load = None
    if args.ckpt_step and not args.load and not args.pretrained_checkpoint:
        where = f"{args.save} holds no checkpoint" if args.save else "there is no --load"
        raise UsageError(
            f"--ckpt-step {args.ckpt_step} asks for a checkpoint, and {where}: give --load with "
            "the --save folder of the run, or leave --ckpt-step out."
        )


def _holds_checkpoint(run: str) -> bool:
    return latest_iteration(run) is not None or release_folder(run) is not None


def _nothing_in(load: Path) -> str:
    """Why --load is refused, and what to give in its place."""
    if is_checkpoint_folder(load):
        iteration = iteration_of(load)
        which = "" if iteration is None else f" --ckpt-step {iteration}"
        return (
            f"--load {load} is one checkpoint, and not the folder of a run: give --load "
            f"{load.parent}{which}."
        )
    there = "holds no checkpoint" if load.is_dir() else "is no folder"
    return (
        f"--load {load} {there}: give the --save folder of a run, or leave --load out to start "
        "from scratch."
    )


def check_against_checkpoint(args: argparse.Namespace) -> None:
    """Refuse flags that contradict the checkpoint that is to be loaded.

    Raises:
        UsageError: with the flag and both values.
    """
    if args.load:
        check_same_model(model_flags(args), args.load, args.ckpt_step)


def check_same_model(wanted: Mapping[str, Any], load: str, iteration: int | None) -> None:
    """Compare a model's flags with those of a checkpoint in a run's folder.

    Args:
        iteration: the checkpoint's; None: the newest.

    Raises:
        UsageError: with the flag and both values.
    """
    for name, there in (read_model_flags(load, iteration) or {}).items():
        here = wanted.get(name, there)
        if here != there and name not in (*LAYOUT_DEPENDENT, *MAY_CHANGE):
            flag = flag_of(name)
            raise UsageError(
                f"{flag} {here} contradicts the checkpoint {load}, which was made with {there}: "
                f"give {flag} {there}, or another --load."
            )
