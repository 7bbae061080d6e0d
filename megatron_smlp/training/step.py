"""One step: forward and backward over the global batch, and the update.

    for each micro-batch    loss, gradients                    Megatron's pipeline schedule
    finalise                sums over ranks, expert bias       Megatron's, within the schedule
    agree                   is a loss not finite, was there a signal, is the time over
    update                  clip, Adam, held back where a number is not finite
    schedule                the next learning rate, unless the update was held back
    updates                 other state of the model: prices of BASE

The host waits for the device once: for the norm of the gradients (decision 76).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import (
    get_current_running_global_batch_size,
    get_num_microbatches,
)
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.training import get_timers
from megatron.training.utils import (
    logical_and_across_model_parallel_group,
    reduce_max_stat_across_model_parallel_group,
)
from torch import Tensor

from megatron_smlp.training.events import Outcome, Update
from megatron_smlp.training.parts import Parts

Forward = Callable[..., Any]
"""Megatron's `forward_step_func`."""


class Step:
    """Makes the steps of a run. Every call is collective.

    Args:
        forward: the loss of one micro-batch (training/forward.py).
        agree: is called when the gradients are there, and sends what all ranks must know.
        may_update: is given the norm of the gradients, once a step; False holds the update back.
        updates: of other state, in order.
    """

    def __init__(
        self,
        parts: Parts,
        *,
        forward: Forward,
        agree: Callable[[], None],
        may_update: Callable[[float | None], bool],
        updates: Sequence[Update] = (),
    ) -> None:
        self.parts, self.forward, self.updates = parts, forward, updates
        self.schedule = get_forward_backward_func()
        self.update = GuardedUpdate(parts.optimizer, agree=agree, may_update=may_update)
        self.are_alike = _are_alike(parts.optimizer)

    def __call__(self, data: Any, iteration: int) -> Outcome:
        """Make one.

        Args:
            data: an iterator over micro-batches, or one for each chunk.
            iteration: from 1 on.
        """
        args, optimizer = self.parts.args, self.parts.optimizer
        reports = self._gradients(data)
        if args.empty_unused_memory_level >= 1:
            torch.cuda.empty_cache()
        learning_rate = get_canonical_lr_for_logging(optimizer.param_groups)
        timers = get_timers()
        timers("optimizer", log_level=1).start(barrier=args.barrier_with_L1_time)
        updated, norm, zeros = self._of_all_stages(*self.update())
        timers("optimizer").stop()
        if updated:
            self.parts.schedule.step(increment=get_current_running_global_batch_size())
        for update in self.updates:
            update(self.parts.model, skipped=not updated)
        if args.empty_unused_memory_level >= 2:
            torch.cuda.empty_cache()
        return Outcome(
            iteration=iteration,
            losses=self._means(reports),
            learning_rate=learning_rate,
            grad_norm=norm,
            num_zeros=zeros,
            skipped=not updated,
            loss_scale=float(optimizer.get_loss_scale()) if scales_losses(optimizer) else 1.0,
        )

    def _gradients(self, data: Any) -> list[dict[str, Tensor]]:
        """Forward and backward over all micro-batches; return the reports of each."""
        args, model = self.parts.args, self.parts.model
        for chunk in model:
            chunk.zero_grad_buffer()
        self.parts.optimizer.zero_grad()
        reports: list[dict[str, Tensor]] = self.schedule(
            forward_step_func=self.forward,
            data_iterator=data,
            model=model,
            num_microbatches=get_num_microbatches(),
            seq_length=args.seq_length,
            micro_batch_size=args.micro_batch_size,
            decoder_seq_length=args.decoder_seq_length,
            forward_only=False,
        )
        return reports

    def _of_all_stages(
        self, updated: bool, norm: float | None, zeros: float | None
    ) -> tuple[bool, float | None, float | None]:
        """Return what holds for all ranks of this model parallel group."""
        if self.are_alike:  # and each knows the others' by its own
            return updated, _rounded(norm), zeros
        group = self.parts.groups.mp
        updated = logical_and_across_model_parallel_group(updated, group=group)
        norm = reduce_max_stat_across_model_parallel_group(norm, group=group)
        if self.parts.args.log_num_zeros_in_grad:
            zeros = reduce_max_stat_across_model_parallel_group(zeros, group=group)
        return updated, norm, zeros

    def _means(self, reports: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return means over the global batch, of sums and counts <float>[2] of micro-batches."""
        if not (reports and mpu.is_pipeline_last_stage(ignore_virtual=True)):
            return {}
        group = self.parts.groups.dp_cp
        means = {}
        for name in reports[0]:
            total = torch.vstack([report[name].view(-1) for report in reports]).sum(dim=0)
            torch.distributed.all_reduce(total, group=group)
            means[name] = total[0] / total[1]
        return means


class GuardedUpdate:
    """Megatron's `optimizer.step`, with a look at the norm before it changes a weight.

    Its `step` computes the norm, clips by it, and calls `step_with_ready_grads`: there the guard is
    asked. Both are replaced on this optimizer alone, when it is built.
    """

    def __init__(
        self,
        optimizer: Any,
        *,
        agree: Callable[[], None],
        may_update: Callable[[float | None], bool],
    ) -> None:
        self.optimizer, self.agree, self.ask = optimizer, agree, may_update
        self.norm: float | None = None
        self.allowed: bool | None = None
        update = optimizer.step_with_ready_grads
        optimizer.step_with_ready_grads = lambda: self.may_update() and update()
        for name in ("get_grad_norm", "clip_grad_norm"):  # of several together, or of one alone
            setattr(optimizer, name, self._noting(getattr(optimizer, name)))

    def __call__(self) -> tuple[bool, float | None, float | None]:
        """Return whether the weights were updated, the norm, and the zeros that were counted.

        Where fp16 overflowed, Megatron leaves the update out before it knows a norm.
        """
        self.norm = self.allowed = None
        self.agree()
        updated, norm, zeros = self.optimizer.step()
        return (updated, norm, zeros) if self.may_update() else (False, None, None)

    def may_update(self) -> bool:
        """Ask once a step."""
        if self.allowed is None:
            self.allowed = self.ask(self.norm)
        return self.allowed

    def _noting(self, function: Callable[..., float]) -> Callable[..., float]:
        def noting(*args: Any, **kwargs: Any) -> float:
            self.norm = function(*args, **kwargs)
            return self.norm

        return noting


def scales_losses(optimizer: Any) -> bool:
    """Return whether it scales losses, and so finds overflows: fp16."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return any(getattr(part, "grad_scaler", None) is not None for part in chained)


def _are_alike(optimizer: Any) -> bool:
    """Return whether all ranks of this model parallel group do the same updates. Collective.

    They read the same gradient norm, and hold an update back for the same loss. A rank without
    parameters has no norm; found overflows of fp16, and a threshold of the norm, are of each rank.
    """
    group = mpu.get_model_parallel_group()
    if group.size() == 1:
        return True
    is_like_others = (
        not getattr(optimizer, "is_stub_optimizer", True)
        and get_canonical_lr_for_logging(optimizer.param_groups) is not None
        and not scales_losses(optimizer)
        and not math.isfinite(optimizer.config.grad_norm_skip_threshold)
    )
    device = torch.cuda.current_device()
    alike = torch.tensor(is_like_others, dtype=torch.int32, device=device)
    torch.distributed.all_reduce(alike, op=torch.distributed.ReduceOp.MIN, group=group)
    return bool(alike)


def _rounded(norm: float | None) -> float | None:
    """Round to fp32, as on its way over ranks."""
    return None if norm is None else torch.tensor(float(norm), dtype=torch.float32).item()
