"""Answer what Megatron's loop asks the ranks about every step, without asking them: table.py.

Each question of the original is a copy to the device that the host waits for, a collective, and a
read that waits for all that the device has to do, the update included: the device then idles until
the host has launched the next step. Decision 76.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from megatron.core import mpu
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging
from megatron.training import get_args, get_tensorboard_writer, training

from megatron_smlp.megatron_patches.wrapping import after, wrapped_in


class Answer(Protocol):
    """What all ranks agreed on before the step's update."""

    @property
    def is_signalled(self) -> bool: ...

    @property
    def is_over(self) -> bool: ...


def installed(take: Callable[[], Answer | None]) -> contextlib.AbstractContextManager[None]:
    """Wrap the functions of its rows in table.py for the time of one `pretrain`.

    Args:
        take: the answer to a step's message, once; None where there was no step.
    """
    loop = _Loop(take)
    return wrapped_in(
        (training, "setup_model_and_optimizer", loop.around_setup),
        (training, "training_log", loop.around_log),
        (training, "evaluate_and_print_results", lambda f: after(loop.forget, f)),
        (training, "checkpoint_and_decide_exit", loop.around_exit),
        (training, "get_signal_handler", loop.around_handler),
        (training, "logical_and_across_model_parallel_group", loop.around_and),
        (training, "reduce_max_stat_across_model_parallel_group", loop.around_max),
    )


class _Loop:
    def __init__(self, take: Callable[[], Answer | None]) -> None:
        self.take = take
        self.answer: Answer | None = None
        self.are_alike = False
        """Whether each rank of this model parallel group knows the others' updates by its own."""

    def around_setup(self, setup: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(setup)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            model, optimizer, scheduler = setup(*args, **kwargs)
            self.are_alike = _are_alike(optimizer)
            if optimizer is not None and not _scales_losses(optimizer):
                _keep_scale_on_host(optimizer)
            return model, optimizer, scheduler

        return wrapped

    def forget(self) -> None:
        """Drop the last answer: a signal may come during an evaluation."""
        self.take()

    def around_exit(self, decide: Callable[..., bool]) -> Callable[..., bool]:
        @functools.wraps(decide)
        def wrapped(*args: Any, **kwargs: Any) -> bool:
            self.answer = self.take()
            flags = get_args()
            limit = flags.exit_duration_in_mins
            if self.answer is not None and not self.answer.is_over:
                flags.exit_duration_in_mins = None
            try:
                return decide(*args, **kwargs)
            finally:
                flags.exit_duration_in_mins = limit

        return wrapped

    def around_handler(self, get_handler: Callable[[], Any]) -> Callable[[], Any]:
        @functools.wraps(get_handler)
        def wrapped() -> Any:
            return get_handler() if self.answer is None else _Signalled(self.answer.is_signalled)

        return wrapped

    def around_and(self, logical_and: Callable[..., bool]) -> Callable[..., bool]:
        @functools.wraps(logical_and)
        def wrapped(input: bool, group: Any = None) -> bool:
            return input is True if self.are_alike else logical_and(input, group)

        return wrapped

    def around_max(self, reduce_max: Callable[..., float | None]) -> Callable[..., float | None]:
        @functools.wraps(reduce_max)
        def wrapped(stat: float | None, group: Any = None) -> float | None:
            if not self.are_alike:
                return reduce_max(stat, group)
            # Rounded, as it is on its way through the device.
            return None if stat is None else torch.tensor(float(stat), dtype=torch.float32).item()

        return wrapped

    def around_log(self, training_log: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(training_log)

        @functools.wraps(training_log)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            given = bound.arguments
            if not given["skipped_iter"] and not _writes(given["iteration"]):
                totals = given["total_loss_dict"]
                for key, loss in given["loss_dict"].items():
                    totals[key] = totals.get(key, loss.new_zeros(1)) + loss
                given["loss_dict"] = {}
            return training_log(*bound.args, **bound.kwargs)

        return wrapped


class _Signalled:
    """Answers as Megatron's DistributedSignalHandler does: for each rank."""

    def __init__(self, is_signalled: bool) -> None:
        self.is_signalled = is_signalled

    def signals_received(self) -> list[bool]:
        return [self.is_signalled]


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
        and not _scales_losses(optimizer)
        and not math.isfinite(optimizer.config.grad_norm_skip_threshold)
    )
    device = torch.cuda.current_device()
    alike = torch.tensor(is_like_others, dtype=torch.int32, device=device)
    torch.distributed.all_reduce(alike, op=torch.distributed.ReduceOp.MIN, group=group)
    return bool(alike)


def _scales_losses(optimizer: Any) -> bool:
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return any(getattr(one, "grad_scaler", None) is not None for one in chained)


def _keep_scale_on_host(optimizer: Any) -> None:
    """Keep the scale on the host: the loop reads it in each step, even if it is always 1."""
    of_device = optimizer.get_loss_scale
    on_host = of_device().cpu()
    optimizer.scale_loss = lambda loss: of_device() * loss
    optimizer.get_loss_scale = lambda: on_host


def _writes(iteration: int) -> bool:
    """Return whether Megatron writes this step's losses to TensorBoard, and so reads them."""
    return bool(get_tensorboard_writer()) and iteration % get_args().tensorboard_log_interval == 0
