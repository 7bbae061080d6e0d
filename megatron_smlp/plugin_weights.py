"""Turns plugin parameters (plugins.Weight) into Megatron's: drawn, sharded, gradients summed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.random import (
    get_cuda_rng_tracker,
    get_data_parallel_rng_tracker_name,
)
from torch import nn

from megatron_smlp.plugins import weights_of


def own_weights(module: nn.Module, *, dtype: torch.dtype, group: Any, whole: bool = False) -> None:
    """Initialize the parameters of a plugin's module, and make them Megatron's.

    Args:
        group: the tensor parallel group.
        whole: whether all ranks compute the same; if not, gradients of uncut weights are partial.
    """
    parts, part = (1, 0) if whole else (group.size(), group.rank())
    device = torch.cuda.current_device() if torch.cuda.is_available() else None
    for weight in weights_of(module):
        if torch.empty(0).is_meta:  # a conversion builds all parameters without values
            weight.to(device="meta", dtype=dtype)
        else:
            weight.draw(parts=parts, part=part)
            weight.to(device=device, dtype=dtype)
        if parts > 1 and weight.cut is not None:
            tensor_parallel.set_tensor_model_parallel_attributes(
                weight.weight, is_parallel=True, dim=weight.cut, stride=1
            )
        elif parts > 1:
            # Each rank uses the same values for a different part: the gradient is a sum over ranks.
            weight.read = partial(tensor_parallel.copy_to_tensor_model_parallel_region, group=group)


def on_cpu[Made: nn.Module](make: Callable[[], Made]) -> Made:
    """Return what `make` builds, with real tensors even where a conversion builds all else on the
    meta device: a plugin may compute with them."""
    with torch._C.DisableTorchFunction():
        return make()


def alike_on_ranks(config: Any, module: nn.Module) -> AbstractContextManager[None]:
    """Let random numbers be the same on all tensor parallel ranks, which compute the same: under
    sequence parallelism Megatron gives each rank numbers of its own."""
    if not (module.training and config.sequence_parallel):
        return nullcontext()
    context: AbstractContextManager[None] = get_cuda_rng_tracker().fork(
        get_data_parallel_rng_tracker_name()
    )
    return context
