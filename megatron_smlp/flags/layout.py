"""Check that the parallel sizes divide processes and batch. No torch: launchers check it too."""

from __future__ import annotations

import argparse
import math

from megatron_smlp.command_line import flag_of
from megatron_smlp.errors import UsageError


def check_layout(args: argparse.Namespace) -> None:
    """Check that the parallel sizes divide the number of processes and the batch.

    Raises:
        UsageError: they do not.
    """
    tp, pp, ep = (
        getattr(args, f"{name}_parallel_size")
        for name in ("tensor_model", "pipeline_model", "expert_model")
    )
    expert_tp = args.expert_tensor_parallel_size or tp
    _check_processes(args, tensor_model=tp, pipeline_model=pp)
    _check_processes(args, expert_tensor=expert_tp, pipeline_model=pp, expert_model=ep)
    data_parallel = args.world_size // (tp * pp)
    step = args.micro_batch_size * data_parallel
    batch = args.global_batch_size
    if batch is not None and batch % step:
        raise UsageError(
            f"--global-batch-size {batch} is not a multiple of {step}, which is --micro-batch-size "
            f"{args.micro_batch_size} on {data_parallel} data parallel "
            f"{'process' if data_parallel == 1 else 'processes'}: give a multiple."
        )


def _check_processes(args: argparse.Namespace, **sizes: int) -> None:
    needed = math.prod(sizes.values())
    if args.world_size % needed:
        flags = {f"{flag_of(name)}-parallel-size": size for name, size in sizes.items() if size > 1}
        layout = " x ".join(f"{flag} {size}" for flag, size in flags.items())
        raise UsageError(
            f"{layout} needs a multiple of {needed} processes, but this run has {args.world_size}: "
            "start that many (torchrun --nproc-per-node; NPROC_PER_NODE of examples/), or lower "
            "the sizes."
        )
