"""Lists of tensors in one operator each, where Megatron loops over them.

With Apex or Transformer Engine a norm, a scaling and a copy are one kernel for all tensors.
Megatron's own replacements take each tensor by itself, and on a GPU wait for each norm. Here they
are torch's `_foreach` operators, which on a CPU loop over the same kernels.

| Megatron's | what it is for | of n tensors, on a GPU |
|---|---|---|
| local_multi_tensor_l2_norm | norm of the gradients, of the parameters | n + 1 waits, n norms |
| local_multi_tensor_scale | clipping | n products, n copies, n temporaries |
| _multi_tensor_copy_this_to_that | fp32 weights to those of the model | n copies |
| DistributedOptimizer's | the same, of this rank's parts | n copies |
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.utils import local_multi_tensor_l2_norm, local_multi_tensor_scale
from megatron.training.utils import common_utils
from torch import Tensor


def apply() -> None:
    """Put the functions below in place of Megatron's, in each module that holds them."""
    names = {clip_grads: "l2_norm_impl", common_utils: "multi_tensor_l2norm"}
    for module, name in names.items():
        if getattr(module, name) is local_multi_tensor_l2_norm:
            setattr(module, name, norm)
    for module in (clip_grads, optimizer):
        if module.multi_tensor_scale_impl is local_multi_tensor_scale:
            module.multi_tensor_scale_impl = scale
    if not distrib_optimizer.HAVE_APEX_OR_TE:
        optimizer._multi_tensor_copy_this_to_that = copy
    _replace_copies_of_parts()


@torch.no_grad()
def norm(
    chunk_size: int, no_op: Tensor, lists: Sequence[Sequence[Tensor]], per_tensor: bool
) -> tuple[Tensor, None]:
    """Return the norm of all elements of lists = [tensors], <fp32>[1], on their device."""
    (tensors,) = lists
    norms = torch.stack(torch._foreach_norm(tensors))
    return torch.linalg.vector_norm(norms, dtype=torch.float32).view(1), None


@torch.no_grad()
def scale(
    chunk_size: int, no_op: Tensor, lists: Sequence[Sequence[Tensor]], factor: float | Tensor
) -> None:
    """Set target = source * factor, for lists = [sources, targets], which may be the same list."""
    sources, targets = lists
    if sources is targets:
        torch._foreach_mul_(targets, factor)
    elif factor == 1:
        copy(sources, targets)
    else:
        copy(torch._foreach_mul(sources, factor), targets)


@torch.no_grad()
def copy(
    this: Sequence[Tensor], that: Sequence[Tensor], overflow_buf: Tensor | None = None
) -> None:
    """Set that = this, tensor by tensor; dtypes may differ."""
    if this:
        torch._foreach_copy_(that, this)


def _replace_copies_of_parts() -> None:
    original = DistributedOptimizer._copy_main_params_to_model_params
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def copy_main_params_to_model_params(self: Any) -> None:
        if _is_plain(self):
            copy(*_parts(self))
        else:
            original(self)

    DistributedOptimizer._copy_main_params_to_model_params = copy_main_params_to_model_params


def _is_plain(optimizer: Any) -> bool:
    """Return False if weights are quantised, held elsewhere, or not on this rank at all."""
    return not (
        optimizer.is_stub_optimizer
        or optimizer.ddp_config.use_megatron_fsdp
        or optimizer.ddp_config.fp8_param_gather
        or optimizer.ddp_config.fp4_param_gather
        or optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
    )


def _parts(optimizer: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Return, for each parameter, the fp32 part that this rank updates and its place in the model's
    buffer."""
    mains, places = [], []
    for main_groups, model_groups in (
        (optimizer.shard_fp32_from_float16_groups, optimizer.model_float16_groups),
        (optimizer.shard_fp32_groups, optimizer.model_fp32_groups),
    ):
        for main_group, model_group in zip(main_groups, model_groups, strict=True):
            for main, parameter in zip(main_group, model_group, strict=True):
                index, _, bucket = optimizer.model_param_gbuf_map[parameter]
                span = optimizer._get_model_param_range_map(parameter)["gbuf_world_in_bucket"]
                flat = optimizer.buffers[index].buckets[bucket].param_data.view(-1)
                mains.append(main)
                places.append(flat[span.start : span.end])
    return mains, places
