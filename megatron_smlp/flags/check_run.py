"""Check that the run can start: ranges, schedule, tokenizer and data, the machine."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import torch

from megatron_smlp.command_line import flag_of
from megatron_smlp.data.blending import (
    PER_SPLIT_FLAGS,
    WHOLE_FLAGS,
    blends_from_arguments,
    has_data,
)
from megatron_smlp.errors import UsageError
from megatron_smlp.options import OUR_FLAGS
from megatron_smlp.partial_prediction import suffix_start
from megatron_smlp.platform import cpu

LEAST = {
    "num_layers": 1,
    "hidden_size": 1,
    "seq_length": 1,
    "train_iters": 1,
    "train_samples": 1,
    "micro_batch_size": 1,
    "global_batch_size": 1,
    "eval_micro_batch_size": 1,
    "eval_global_batch_size": 1,
    "lr": 0,
    "min_lr": 0,
    "weight_decay": 0,
    "clip_grad": 0,
    "lr_warmup_iters": 0,
    "lr_warmup_samples": 0,
    "lr_decay_iters": 1,
    "lr_decay_samples": 1,
    "lr_wsd_decay_iters": 1,
    "lr_wsd_decay_samples": 1,
    "log_interval": 1,
    "tensorboard_log_interval": 1,
    "log_memory_interval": 1,
    "eval_iters": 0,
    "eval_interval": 0,
    "save_interval": 0,
    "save_retain_interval": 1,
    "exit_interval": 0,
    "exit_duration_in_mins": 0,
    "num_workers": 0,
    "seed": 1,
    "ckpt_step": 0,
    "vocab_size": 1,
    "make_vocab_size_divisible_by": 1,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
    "context_parallel_size": 1,
    "moe_router_topk": 1,
    "moe_shared_expert_intermediate_size": 1,
    "init_method_std": 0,
    "embedding_init_method_std": 0,
}
UNDER_ONE = ("lr_warmup_fraction", "hidden_dropout", "attention_dropout")


def check_values(args: argparse.Namespace) -> None:
    """Check the range of each number that was given.

    Raises:
        UsageError: with the flag, its value and the range.
    """
    ours = {name: facts.least for name, facts in OUR_FLAGS.items() if facts.least is not None}
    for name, least in {**LEAST, **ours}.items():
        value = getattr(args, name)
        if value is not None and not value >= least:  # NaN is refused too
            raise UsageError(f"{flag_of(name)} {value}: give {least} or more.")
    for name in UNDER_ONE:
        value = getattr(args, name)
        if value is not None and not 0 <= value < 1:
            raise UsageError(f"{flag_of(name)} {value}: give 0 or more, and less than 1.")
    if args.peak_tflops is not None and not args.peak_tflops > 0:
        raise UsageError(
            f"--peak-tflops {args.peak_tflops}: give a positive number, or leave it out."
        )


def check_ranges(args: argparse.Namespace) -> None:
    """Check the range of each number on its own, and the shares of --split."""
    check_values(args)
    _check_split(args)


def _check_split(args: argparse.Namespace) -> None:
    per_split = [name for name in PER_SPLIT_FLAGS if getattr(args, name)]
    if args.split is not None and per_split:
        raise UsageError(
            f"--split {args.split} cannot be combined with {flag_of(per_split[0])}: each split's "
            "data has its own flag. Leave --split out."
        )
    words = (args.split or "1").split(",")
    # Megatron searches for digits and points, and would read 1e-2 as two shares.
    is_plain = all(re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*", word) for word in words)
    shares = [float(word) for word in words] if is_plain else []
    if not 1 <= len(shares) <= 3:
        raise UsageError(
            f"--split {args.split}: give shares of training, validation and test, like 95,5,0."
        )
    if not shares[0] and not args.skip_train:
        raise UsageError(
            f"--split {args.split} leaves nothing to train on: its first share must be over 0."
        )


def check_schedule(args: argparse.Namespace) -> None:
    """Check that steps, warm-up and evaluation fit together."""
    _check_length(args)
    suffix_start(args)
    if args.lr is None:
        raise UsageError("--lr is missing: give the peak learning rate, for example --lr 1e-3.")
    for flag, rate, course in (
        ("--min-lr", args.min_lr, "decays from --lr to --min-lr"),
        ("--lr-warmup-init", args.lr_warmup_init, "rises from --lr-warmup-init to --lr"),
    ):
        if (rate or 0.0) > args.lr:
            raise UsageError(
                f"{flag} {rate} exceeds --lr {args.lr}: the learning rate {course}. Lower {flag}."
            )
    every, interval = args.keep_every, args.explicit_flags.get("save_interval")
    if every and interval and every % interval:
        raise UsageError(
            f"--keep-every {every} (or --save-retain-interval) is not a multiple of "
            f"--save-interval {interval}, so nothing is saved at most of what it would keep: give "
            "a multiple."
        )
    if args.profile and args.train_iters and args.profile_step_end > args.train_iters:
        raise UsageError(
            f"--profile-step-end {args.profile_step_end} exceeds --train-iters {args.train_iters}: "
            "nothing would be written. Lower it or train longer."
        )
    _check_validation_sets(args)
    if (args.eval_iters or args.full_validation) and not has_data(args, "valid"):
        flag, rest = f"--eval-iters {args.eval_iters}", "give --eval-iters 0"
        if args.full_validation:
            flag, rest = "--full-validation", "leave it out"
        raise UsageError(
            f"{flag} without validation data: {rest}, or give --valid-data-path, or a second share "
            "of --split over 0."
        )


def _check_validation_sets(args: argparse.Namespace) -> None:
    """Refuse validation sets that Megatron would not read as asked, and names that do not fit."""
    rows = args.eval_micro_batch_size or args.micro_batch_size
    is_split = args.tensor_model_parallel_size * args.pipeline_model_parallel_size > 1
    if args.full_validation and rows != 1 and is_split:
        raise UsageError(
            "--full-validation reads one sample at a time, but other model ranks expect "
            f"micro-batches of {rows}: give --eval-micro-batch-size 1."
        )
    blends = blends_from_arguments(args)
    if args.multiple_validation_sets and blends.whole and len(blends.whole.prefixes) > 1:
        raise UsageError(
            "--multiple-validation-sets evaluates each dataset of --valid-data-path alone, but "
            "--data-path mixes them: give --train-data-path and --valid-data-path."
        )
    valid = (blends.per_split or (None, None))[1]
    if args.multiple_validation_sets and valid and valid.weights and len(valid.prefixes) > 1:
        raise UsageError(
            "--multiple-validation-sets evaluates each dataset alone and ignores weights: leave "
            "out the weights of the validation datasets."
        )
    blend = blends.whole or valid
    if args.full_validation and blend and blend.weights:
        raise UsageError(
            "--full-validation reads each dataset once and ignores weights: name the validation "
            "datasets by --valid-data-path, without weights, and the training datasets by "
            "--train-data-path."
        )
    if not args.multiple_validation_sets:
        return
    names, sets = args.validation_set_names, len(valid.prefixes) if valid else 1
    if names and not len(set(names)) == len(names) == sets:
        raise UsageError(
            f"--validation-set-names {' '.join(names)}: give {sets} different names, one for each "
            "dataset of --valid-data-path."
        )


def _check_length(args: argparse.Namespace) -> None:
    """Check the length of the run, and that the learning rate's phases fit into it."""
    unit = "iters" if args.train_iters else "samples"
    length = args.train_iters or args.train_samples
    if not length:
        raise UsageError("--train-iters is missing: give it (or --train-samples).")
    ranks = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    batch = args.global_batch_size or args.micro_batch_size * max(1, args.world_size // ranks)
    if args.train_samples and args.train_samples < batch and not args.step_batch_size_schedule:
        raise UsageError(
            f"--train-samples {args.train_samples} is less than a batch: give {batch} or more."
        )
    decay = getattr(args, f"lr_decay_{unit}")
    warmup = getattr(args, f"lr_warmup_{unit}")
    if warmup >= (decay or length):
        raise UsageError(
            f"--lr-warmup-{unit} {warmup} must be under --lr-decay-{unit} or --train-{unit} "
            f"{decay or length}. Lower it, or use --lr-warmup-fraction."
        )
    if args.lr_decay_style == "WSD" and not getattr(args, f"lr_wsd_decay_{unit}"):
        raise UsageError(
            f"--lr-decay-style WSD needs --lr-wsd-decay-{unit}, the length of its last phase."
        )


def check_tokenizer_and_data(args: argparse.Namespace) -> None:
    """Check that there is a tokenizer, with what its type needs, and one source of data."""
    if args.tokenizer_type is None:
        raise UsageError(
            "--tokenizer-type is missing: give it as --tokenizer-type HuggingFaceTokenizer "
            "--tokenizer-model FOLDER, as in preprocessing; NullTokenizer with --vocab-size is "
            "enough for --mock-data and --dry-run."
        )
    if "Null" in args.tokenizer_type and not args.vocab_size:
        raise UsageError(
            f"--tokenizer-type {args.tokenizer_type} without --vocab-size: give the number of ids."
        )
    if args.tokenizer_type == "GPT2BPETokenizer" and not (args.vocab_file and args.merge_file):
        raise UsageError(
            "--tokenizer-type GPT2BPETokenizer without --vocab-file and --merge-file: give both, "
            "GPT-2's vocab.json and merges.txt."
        )
    sized = ("Null", "ByteLevel", "TikTok")
    if "vocab_size" in args.explicit_flags and not any(k in args.tokenizer_type for k in sized):
        raise UsageError(
            f"--vocab-size {args.vocab_size} has no effect with --tokenizer-type "
            f"{args.tokenizer_type}, which sets its own size: leave it out."
        )
    _check_tokenizer_path(args.tokenizer_model)
    data = [name for name in (*WHOLE_FLAGS, *PER_SPLIT_FLAGS) if getattr(args, name)]
    if args.mock_data and data:
        raise UsageError(
            f"--mock-data with {flag_of(data[0])}: the data would not be read. Give only one."
        )
    if not (args.skip_train or has_data(args, "train")):
        raise UsageError(
            f"{flag_of(data[0])} without training data: give --train-data-path (in a file of all "
            'splits, a list under "train"), or --skip-train.'
        )


def _check_tokenizer_path(model: str | None) -> None:
    """Refuse a name that the hub cannot have: requests for it would take minutes to fail."""
    if model is None or Path(model).exists():
        return
    parts = Path(model).parts
    in_a_folder = len(parts) == 2 and Path(parts[0]).is_dir()
    if in_a_folder or len(parts) > 2 or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):
        raise UsageError(
            f"--tokenizer-model {model}: no such file or folder, and not a valid name on the "
            "Hugging Face hub. Give the tokenizer's folder, or NAME or OWNER/NAME of the hub."
        )


def _check_devices() -> None:
    number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= count:
        error = UsageError(
            f"{os.environ.get('LOCAL_WORLD_SIZE')} processes on a machine with {count} "
            f"GPU{'s' * (count > 1)} that torch sees: start one per GPU (--nproc-per-node, "
            "NPROC_PER_NODE), or give --platform cpu."
        )
        if number == count:  # only the first rank without a GPU prints it
            error.speaker = ""
        raise error


def _check_compiler() -> None:
    """Refuse a GPU run that would fail at the first kernel that torch or Triton compiles."""
    if not (os.environ.get("CC") or any(map(shutil.which, ("gcc", "clang")))):
        raise UsageError(
            "neither gcc nor clang was found, and Triton needs a C compiler for its driver: "
            "install one, or set CC to one."
        )
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        raise UsageError(
            f"{header} is missing, and Triton needs it to build its driver: install Python's "
            "headers (python3-dev), or use uv's Python."
        )


def _check_transformer_engine(args: argparse.Namespace) -> None:
    if args.transformer_impl != "local" and find_spec("transformer_engine") is None:
        raise UsageError(
            f"--transformer-impl {args.transformer_impl} needs Transformer Engine, which is not "
            "installed: install it (docs/gpus.md), or leave it out."
        )


def check_machine(args: argparse.Namespace) -> None:
    """Check that the machine has the devices and packages that these flags need."""
    if not cpu.needed():
        _check_devices()
        _check_compiler()
    _check_transformer_engine(args)
