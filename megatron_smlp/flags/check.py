"""Third phase: refuse bad arguments. Nothing assigns to the namespace before Megatron validates.

Each check raises a UsageError with the flag, its value, what is allowed and what to do. Megatron
stops at most of these with an assertion that names no flag, sometimes after minutes, and silently
accepts the others.
"""

from __future__ import annotations

import argparse
import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path

from megatron_smlp.checkpoints.folders import (
    RELEASE,
    TRACKER,
    folder_at,
    is_checkpoint_folder,
    is_same_folder,
    iteration_folder,
    iteration_of,
    tracked_folder,
)
from megatron_smlp.checkpoints.run_record import read_run_record
from megatron_smlp.command_line import flag_of
from megatron_smlp.data.tokenizers.factory import strings_of_tokens
from megatron_smlp.data.tokenizers.folder import local_gpt2_files
from megatron_smlp.errors import ServiceError, UsageError
from megatron_smlp.flags.check_execution import (
    check_cuda_graphs,
    check_fp16,
    check_muon,
    check_recomputing,
)
from megatron_smlp.flags.check_model import check_model
from megatron_smlp.flags.check_needs import check_choices, check_needs, refuse_unless
from megatron_smlp.flags.check_routers import check_feature_router, check_token_router
from megatron_smlp.flags.check_run import (
    check_machine,
    check_schedule,
    check_tokenizer_and_data,
)
from megatron_smlp.flags.layout import check_layout
from megatron_smlp.platform import choice, cpu


def check(args: argparse.Namespace) -> None:
    """Check everything that can be checked before Megatron's own validation."""
    check_token_router(args)
    check_choices(args)
    _check_load(args)
    choice.check(args.platform)
    cpu.check_flags(args)
    refuse_unless(args, "architecture")
    refuse_unless(args, "input_projection")
    check_model(args)
    check_feature_router(args)
    check_needs(args)
    check_fp16(args)
    check_muon(args)
    check_recomputing(args)
    check_cuda_graphs(args)
    check_schedule(args)
    check_layout(args)
    check_tokenizer_and_data(args)
    check_machine(args)


def _check_load(args: argparse.Namespace) -> None:
    """Refuse a --load that holds no checkpoint: Megatron would start from scratch."""
    if args.load and tracked_folder(args.load) is None:
        raise UsageError(_nothing_in(Path(args.load)))
    unnamed = Path(args.save) / RELEASE if args.save and not args.load else None
    if unnamed and unnamed.is_dir() and not args.no_resume:
        raise UsageError(
            f"{unnamed} holds weights that {TRACKER} next to it does not name: write {RELEASE} "
            "into that file, or start from scratch with --no-resume."
        )
    _check_branch(args)
    if args.ckpt_step and not args.load:
        where = f"{args.save} holds no checkpoint" if args.save else "--load is missing"
        where = "--no-resume ignores the one in --save" if args.no_resume else where
        raise UsageError(
            f"--ckpt-step {args.ckpt_step} needs a checkpoint, but {where}: give --load with the "
            "--save folder of the run, or leave --ckpt-step out."
        )
    _check_kept_schedule(args)


def _check_branch(args: argparse.Namespace) -> None:
    """Refuse a branch that lacks a source, saves into the source's folder, or outruns the data."""
    if args.branch_from is None:
        return
    flag, length = f"--branch-from {args.branch_from}", args.explicit_flags.get("train_iters")
    if not (args.load and length):
        raise UsageError(
            f"{flag} needs --load, the --save folder of the original run, and that run's "
            "--train-iters: give both."
        )
    step, style = (args.explicit_flags.get(name) for name in ("ckpt_step", "lr_decay_style"))
    if step not in (None, args.branch_from):
        raise UsageError(f"{flag} starts there, not at --ckpt-step {step}: leave that out.")
    if style not in (None, "constant", "WSD"):
        raise UsageError(
            f"{flag} decays a constant rate by WSD, not --lr-decay-style {style}: leave that out."
        )
    newest = tracked_folder(args.load)
    own = ((read_run_record(newest) if newest else None) or {}).get("flags", {})
    if is_same_folder(args.load, args.save) and own.get("branch_from") != args.branch_from:
        raise UsageError(f"{flag} would write to the original run's folder: give another --save.")
    if args.ckpt_step:  # else the branch resumes from its own checkpoint
        start = iteration_folder(args.load, args.ckpt_step)
        if not start.is_dir():
            raise UsageError(f"{flag}: {args.load} holds no checkpoint of that iteration.")
        then = (read_run_record(start) or {}).get("flags", {})
        if (style := then.get("lr_decay_style", "constant")) != "constant":
            raise UsageError(
                f"{flag}: {args.load} was trained with --lr-decay-style {style}, but a branch "
                "needs a constant rate: train with --lr-decay-style constant."
            )
    if args.train_iters > length:
        raise UsageError(
            f"{flag} with --lr-wsd-decay-iters {args.lr_wsd_decay_iters} ends at iteration "
            f"{args.train_iters}, past the run's data (--train-iters {length}): branch "
            "earlier, lower --lr-wsd-decay-iters, or raise --train-iters."
        )


def _check_kept_schedule(args: argparse.Namespace) -> None:
    """Refuse changed rates and decays with --use-checkpoint-opt_param-scheduler: the optimizer's
    param groups would use the run's values, and the rest of the schedule the checkpoint's."""
    if args.use_checkpoint_opt_param_scheduler and args.override_opt_param_scheduler:
        raise UsageError(
            "--use-checkpoint-opt_param-scheduler keeps the checkpoint's schedule, "
            "--override-opt_param-scheduler the command line's: leave one of them out."
        )
    if not (args.use_checkpoint_opt_param_scheduler and args.load):
        return
    folder = folder_at(args.load, args.ckpt_step)
    then = ((read_run_record(folder) if folder else None) or {}).get("flags", {})
    decays = ("lr_wsd_decay_iters", "lr_wsd_decay_samples", "lr_wsd_decay_style")
    for name in ("lr", "min_lr", "weight_decay", *decays):
        flag, now = flag_of(name), getattr(args, name)
        if (kept := then.get(name, now)) != now:
            own = f"no {flag}" if now is None else f"{flag} {now}"
            remedy = f"leave {flag} out" if kept is None else f"give {flag} {kept}"
            raise UsageError(
                f"{own} with --use-checkpoint-opt_param-scheduler, which keeps the checkpoint's "
                f"{kept}: {remedy}, or leave the latter out."
            )


def _nothing_in(load: Path) -> str:
    """Return why --load is refused, and what to give instead."""
    if is_checkpoint_folder(load):
        iteration = iteration_of(load)
        which = "" if iteration is None else f" --ckpt-step {iteration}"
        return (
            f"--load {load} is a single checkpoint, not a run's folder: give --load "
            f"{load.parent}{which}."
        )
    there = "holds no checkpoint" if load.is_dir() else "is not a folder"
    return (
        f"--load {load} {there}: give the --save folder of a run, or leave --load out to start "
        "from scratch."
    )


def validate(args: argparse.Namespace) -> None:
    """Run Megatron's own validation, which fills in more values, and set its global state.

    Raises:
        UsageError: with Megatron's reason or, if it gives none, the check that failed.
    """
    from megatron.training import get_tokenizer
    from megatron.training.arguments import validate_args
    from megatron.training.global_vars import set_global_variables

    with _wandb_refusals(args), megatrons_refusals(), local_gpt2_files(args):
        validate_args(args, {"tokenizer_type": "GPT2BPETokenizer"})
        # Makes Megatron fork a process for each save: megatron_patches/checkpoint_files.py.
        args.use_persistent_ckpt_worker = False
        set_global_variables(args)
    if get_tokenizer().eod is None:
        raise UsageError(
            f"--tokenizer-model {args.tokenizer_model} has no EOS token, which Megatron's datasets "
            "require: set eos_token in its tokenizer_config.json."
        )
    size, padded = get_tokenizer().vocab_size, args.padded_vocab_size
    if size > padded and "padded_vocab_size" not in args.explicit_flags:
        raise UsageError(
            f"the tokenizer has {size} entries, but the checkpoint {args.load} only {padded}, with "
            "padding: give the run's tokenizer, or another folder."
        )
    if size > padded or padded % args.tensor_model_parallel_size:
        raise UsageError(
            f"--padded-vocab-size {padded}: give a multiple of --tensor-model-parallel-size "
            f"{args.tensor_model_parallel_size} of at least the tokenizer's {size} ids, or leave "
            "it out."
        )
    if args.input_projection == "minhash":
        strings_of_tokens(args)


@contextlib.contextmanager
def _wandb_refusals(args: argparse.Namespace) -> Iterator[None]:
    """Turn an error of W&B's, such as a missing login, into one line; its last rank starts W&B.

    Raises:
        ServiceError: with W&B's reason.
    """
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith("wandb."):
            raise
        raise ServiceError(
            f"--wandb-project {args.wandb_project}: {' '.join(str(error).split())} To log without "
            "the service, set WANDB_MODE=offline."
        ) from error


@contextlib.contextmanager
def megatrons_refusals() -> Iterator[None]:
    """Turn Megatron's errors about its arguments into one line, those without a message included.

    Raises:
        UsageError: with Megatron's reason.
    """
    try:
        yield
    except (AssertionError, ValueError, TypeError, RuntimeError, OSError, SystemExit) as error:
        raise UsageError(f"Megatron refuses these arguments: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if text:
        return text
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"`{frame.line}` ({Path(frame.filename).name}, line {frame.lineno})"
