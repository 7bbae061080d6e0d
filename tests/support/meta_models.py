"""Models of any size in any layout, built by Megatron as on one rank, without storage."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.in_process import build_model

from megatron_smlp.accounting.costs import ModelShape
from megatron_smlp.accounting.ranks import ParallelLayout, parameters_on_rank, stage_cost


def expected_parameters(args: Any, *, stage: int) -> int:
    shape, layout = ModelShape.from_args(args), ParallelLayout.from_args(args)
    return sum(parameters_on_rank(stage_cost(shape, layout, stage), layout))


def built_parameters(args: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return the size of Megatron's model on `args.rank` of a fake process group."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    args.use_cpu_initialization, args.perform_initialization = False, False
    store = FakeStore()
    torch.distributed.init_process_group(
        "fake", store=store, rank=args.rank, world_size=args.world_size
    )
    try:
        parallel_state.initialize_model_parallel(
            args.tensor_model_parallel_size,
            args.pipeline_model_parallel_size,
            expert_model_parallel_size=args.expert_model_parallel_size,
            expert_tensor_parallel_size=args.expert_tensor_parallel_size,
            create_gloo_process_groups=False,
        )
        model_parallel_cuda_manual_seed(1)
        with monkeypatch.context() as patched, torch.device("meta"):
            # Megatron allocates on the current device by name.
            patched.setattr(torch.cuda, "current_device", lambda: torch.device("meta"))
            model = build_model(args)
        return sum(parameter.numel() for parameter in model.parameters())
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
