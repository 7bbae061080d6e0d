"""Megatron's model parallel groups in a single process: every group consists of this one rank."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from megatron_smlp.platform import cpu


@contextlib.contextmanager
def one_process() -> Iterator[None]:
    """Set up gloo over an in-memory store; groups that exist already are used as they are.

    Everything is on the CPU, even in a process that has CUDA: a model here is built without memory
    and computes with weights as they are read from disk.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    cpu.apply(everywhere=True)
    if torch.distributed.is_initialized():
        yield
        return
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1234)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
