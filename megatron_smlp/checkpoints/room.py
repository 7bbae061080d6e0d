"""Has a GPU the memory that Megatron needs to put the optimizer's state together for a save?"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import torch


def gathers_on_gpus(args: argparse.Namespace) -> bool:
    """Return whether a save puts the optimizer's state together there, before it writes."""
    return bool(
        args.use_distributed_optimizer
        and args.dist_ckpt_optim_fully_reshardable
        and not args.distrib_optim_fully_reshardable_mem_efficient
        and not args.no_save_optim
    )


def missing_room(optimizer: Any) -> str:
    """Return what is missing for that, or an empty text.

    The memory is taken as `DistributedOptimizer.get_parameter_state_dp_zero` takes it, and is
    cached for it: there, in the middle of a collective, the other ranks would wait for ever.
    """
    for single in getattr(optimizer, "chained_optimizers", [optimizer]):
        for bucket in itertools.chain(*(b.buckets for b in getattr(single, "buffers", ()))):
            ranks = single.data_parallel_group.size()
            part = bucket.grad_data.numel() // ranks
            try:
                _take(ranks + 1, part)  # one of each rank, and this one's copy
            except torch.OutOfMemoryError:
                gigabytes = (ranks + 1) * part * torch.float32.itemsize / 2**30
                return f"a GPU has no room for {gigabytes:.1f} GiB of the optimizer's state"
    return ""


def _take(count: int, size: int) -> None:
    device = torch.cuda.current_device()
    _ = [torch.empty(size, dtype=torch.float32, device=device) for _ in range(count)]
