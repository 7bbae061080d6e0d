"""Numbers that no run can use, each for itself. No torch: early.py refuses them too."""

from __future__ import annotations

import argparse

from megatron_smlp.command_line import flag_of
from megatron_smlp.errors import UsageError
from megatron_smlp.options import OUR_FLAGS

LEAST = {
    "train_iters": 1,
    "train_samples": 1,
    "global_batch_size": 1,
    "lr": 0,
    "min_lr": 0,
    "weight_decay": 0,
    "clip_grad": 0,
    "lr_warmup_iters": 0,
    "lr_warmup_samples": 0,
    "lr_decay_iters": 1,
    "lr_decay_samples": 1,
    "log_interval": 1,
    "eval_iters": 0,
    "eval_interval": 0,
    "save_interval": 0,
    "exit_interval": 0,
    "exit_duration_in_mins": 0,
    "num_workers": 0,
    "seed": 1,
    "ckpt_step": 0,
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
    """Check each number that was given.

    Raises:
        UsageError: with flag, value and range.
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
