"""One step: forward and backward over the global batch, and the update.

    for each micro-batch    loss, gradients                    Megatron's pipeline schedule
    finalize                sums over ranks, expert bias       Megatron's, within the schedule
    agree                   is a loss non-finite, did a signal arrive, is the time up
    update                  clip, Adam; skipped if a number is not finite
    schedule                the next learning rate, unless the update was skipped
    updates                 other state of the model, such as BASE's prices

The host waits for the device once per step: for the gradient norm (decision 76).
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
    """Runs the steps of a training. Every call is collective.

    Args:
        forward: computes the loss of one micro-batch (training/forward.py).
        agree: called when the gradients are ready; sends what all ranks must know.
        may_update: called once per step with the gradient norm; False skips the update.
        updates: updates of other model state, in order.
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
        """Run one step.

        Args:
            data: an iterator over micro-batches, or one per model chunk.
            iteration: its number, counted from 1.
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
        """Run forward and backward over all micro-batches; return the report of each."""
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
        """Return the outcome that holds for the whole model parallel group."""
        if self.are_alike:  # every rank already has it
            return updated, _rounded(norm), zeros
        group = self.parts.groups.mp
        updated = logical_and_across_model_parallel_group(updated, group=group)
        norm = reduce_max_stat_across_model_parallel_group(norm, group=group)
        if self.parts.args.log_num_zeros_in_grad:
            zeros = reduce_max_stat_across_model_parallel_group(zeros, group=group)
        return updated, norm, zeros

    def _means(self, reports: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return means over the global batch from each micro-batch's sum and count, <float>[2]."""
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
    """Megatron's `optimizer.step`, with a check of the gradient norm before any weight changes.

    Megatron's `step` computes the norm, clips by it, and calls `step_with_ready_grads`. Wrappers
    that note the norm and ask `may_update` are installed on this optimizer instance only.
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
        optimizer.get_grad_norm = self._noting(optimizer.get_grad_norm)

    def __call__(self) -> tuple[bool, float | None, float | None]:
        """Return whether the weights were updated, the gradient norm, and the number of zeros.

        On an fp16 overflow, Megatron skips the update before it computes a norm.
        """
        self.norm = self.allowed = None
        self.agree()
        updated, _, zeros = self.optimizer.step()
        return (updated, self.norm, zeros) if self.may_update() else (False, None, None)

    def may_update(self) -> bool:
        """Ask the guard, once per step."""
        if self.allowed is None:
            # With Transformer Engine the norm is on the device: read it here, not again behind the
            # update.
            self.norm = None if self.norm is None else float(self.norm)
            self.allowed = self.ask(self.norm)
        return self.allowed

    def _noting(self, grad_norm: Callable[[], float]) -> Callable[[], float]:
        def noting() -> float:
            self.norm = grad_norm()
            return self.norm

        return noting


def scales_losses(optimizer: Any) -> bool:
    """Return whether the optimizer scales losses, and so detects overflows (fp16)."""
    return any(
        getattr(part, "grad_scaler", None) is not None for part in optimizer.chained_optimizers
    )


def _are_alike(optimizer: Any) -> bool:
    """Return whether all ranks of this model parallel group do the same updates. Collective.

    In general they see the same norm and skip an update for the same loss. But a rank without
    parameters has no norm, and fp16 overflows and a norm threshold are judged per rank.
    """
    group = mpu.get_model_parallel_group()
    if group.size() == 1:
        return True
    is_like_others = (
        not optimizer.is_stub_optimizer
        and get_canonical_lr_for_logging(optimizer.param_groups) is not None
        and not scales_losses(optimizer)
        and not math.isfinite(optimizer.config.grad_norm_skip_threshold)
    )
    device = torch.cuda.current_device()
    alike = torch.tensor(is_like_others, dtype=torch.int32, device=device)
    torch.distributed.all_reduce(alike, op=torch.distributed.ReduceOp.MIN, group=group)
    return bool(alike)


def _rounded(norm: float | None) -> float | None:
    """Round to fp32, as the reduction over ranks does."""
    return None if norm is None else torch.tensor(float(norm), dtype=torch.float32).item()
