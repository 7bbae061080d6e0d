"""Check that a GPU has the memory that Megatron needs to gather optimizer state for a save."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from typing import Any

import torch


def gathers_on_gpus(args: argparse.Namespace) -> bool:
    """Return whether a save gathers the optimizer's state on GPUs before it writes."""
    return bool(
        args.use_distributed_optimizer
        and args.dist_ckpt_optim_fully_reshardable
        and not args.distrib_optim_fully_reshardable_mem_efficient
        and not args.no_save_optim
    )


def missing_room(optimizer: Any) -> str:
    """Return what memory is missing for that, or an empty string.

    Memory is allocated as `DistributedOptimizer.get_parameter_state_dp_zero` will, and stays cached
    for it: an error there, in the middle of a collective, would leave other ranks waiting forever.
    NCCL gathers into one block, from which torch copies to the parts.
    """
    for single in optimizer.chained_optimizers:
        for bucket in itertools.chain(*(b.buckets for b in getattr(single, "buffers", ()))):
            ranks = single.data_parallel_group.size()
            part = bucket.grad_data.numel() // ranks
            blocks = [part] * (ranks + 1) + [
                ranks * part
            ]  # one part per rank, and this rank's copy
            try:
                _take(blocks)
            except torch.OutOfMemoryError:
                gigabytes = sum(blocks) * torch.float32.itemsize / 2**30
                return f"a GPU lacks memory for {gigabytes:.1f} GiB of optimizer state"
    return ""


def _take(sizes: Sequence[int]) -> None:
    device = torch.cuda.current_device()
    _ = [torch.empty(size, dtype=torch.float32, device=device) for size in sizes]
