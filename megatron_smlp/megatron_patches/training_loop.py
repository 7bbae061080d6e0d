"""Hook an observer and a guard of updates into `megatron.training`'s loop.

The loop offers no callbacks, so six of its module-level functions are wrapped; each wrapper calls
the original with its own arguments. table.py has the functions and the reasons, tests/contract
their signatures.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging
from megatron.training import get_args, training

from megatron_smlp.megatron_patches import torch_adam
from megatron_smlp.megatron_patches.wrapping import after, wrapped_in


class Observer(Protocol):
    """Is told of the loop's events. Every method is called on every rank, in lockstep."""

    def built(self, model: list[Any], optimizer: Any) -> None: ...

    def stepped(
        self,
        losses: dict[str, torch.Tensor],
        *,
        iteration: int,
        learning_rate: float | None,
        grad_norm: float | None,
        skipped: bool,
        loss_scale: float,
    ) -> None: ...

    def ways_to_evaluate(self) -> Iterator[tuple[str, AbstractContextManager[None]]]:
        """Yield, for each pass over the samples, the prefix of its losses' names and the context to
        run it in. The first pass has neither."""

    def validated(
        self, losses: dict[str, torch.Tensor], *, iteration: int, title: str, seconds: float
    ) -> None: ...

    def held_up(self, *, seconds: float) -> None:
        """Take note that the loop saved a checkpoint, or started to."""


def installed(
    observer: Observer,
    *,
    may_update: Callable[[float | None], bool],
    before_update: Callable[[], None] = lambda: None,
    begins: Callable[[], None] = lambda: None,
) -> AbstractContextManager[None]:
    """Wrap the functions for the time of one `pretrain`, and put the originals back.

    Args:
        may_update: is given the gradient norm, None where a loss scaler has overflowed; False holds
            the step's optimizer update back. Is asked once a step.
        before_update: is called when the gradients are there.
        begins: is called on every rank before the first step.
    """
    validation = _Validation(observer)
    updates = _Updates(observer, may_update=may_update, before_update=before_update)
    return wrapped_in(
        (training, "setup_model_and_optimizer", updates.around_setup),
        (training, "train", lambda f: after(begins, f)),
        (training, "training_log", updates.around_log),
        (training, "evaluate", validation.around_evaluate),
        (training, "evaluate_and_print_results", validation.around_printing),
        (training, "save_checkpoint_and_time", _timed(observer)),
    )


class _Updates:
    """Guards the optimizer's updates, and ties each to the learning rate that it was made with.

    By the time that Megatron logs a step its schedule has moved on to the rate of the next one.
    """

    def __init__(
        self,
        observer: Observer,
        *,
        may_update: Callable[[float | None], bool],
        before_update: Callable[[], None],
    ) -> None:
        self.observer = observer
        self.may_update, self.before_update = may_update, before_update
        self.learning_rate: float | None = None
        self.grad_norm: float | None = None

    def around_setup(self, setup: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(setup)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            model, optimizer, scheduler = setup(*args, **kwargs)
            self.observer.built(model, optimizer)
            if optimizer is not None:
                torch_adam.fuse_steps(optimizer)
                optimizer.step = self._guarded(optimizer)
            return model, optimizer, scheduler

        return wrapped

    def _guarded(self, optimizer: Any) -> Callable[[], Any]:
        step, update = optimizer.step, optimizer.step_with_ready_grads

        def noting(norm: Callable[..., float]) -> Callable[..., float]:
            @functools.wraps(norm)
            def wrapped(*args: Any, **kwargs: Any) -> float:
                self.grad_norm = norm(*args, **kwargs)
                return self.grad_norm

            return wrapped

        @functools.wraps(step)
        def wrapped() -> Any:
            self.learning_rate = get_canonical_lr_for_logging(optimizer.param_groups)
            self.grad_norm = None
            self.before_update()
            may_update = functools.cache(lambda: self.may_update(self.grad_norm))
            optimizer.step_with_ready_grads = lambda: may_update() and update()
            done = step()
            # Where fp16 overflowed, the update was left out before anybody asked. Not successful,
            # no gradient norm, no zeros counted: Megatron then counts a skipped step and leaves
            # the learning rate schedule where it is.
            return done if may_update() else (False, None, None)

        for name in ("get_grad_norm", "clip_grad_norm"):  # of several together, or of one alone
            setattr(optimizer, name, noting(getattr(optimizer, name)))
        return wrapped

    def around_log(self, training_log: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(training_log)

        @functools.wraps(training_log)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            self.observer.stepped(
                given["loss_dict"],
                iteration=given["iteration"],
                learning_rate=self.learning_rate,
                grad_norm=given["grad_norm"],
                skipped=bool(given["skipped_iter"]),
                loss_scale=given["loss_scale"],
            )
            return training_log(*args, **kwargs)

        return wrapped


class _Validation:
    """Ties the numbers that `evaluate` returns to the iteration that only its caller knows.

    Megatron validates once more after the training, on other samples, also where it has just done
    so by its interval; then the second time is left out.
    """

    def __init__(self, observer: Observer) -> None:
        self.observer = observer
        self.iteration, self.title = -1, ""
        self.sets: Iterator[str] = iter(())

    def around_printing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            title = "test" if given["prefix"].endswith("test set") else "validation"
            if (given["iteration"], title) == (self.iteration, self.title):
                return None
            self.iteration, self.title = given["iteration"], title
            self.sets = _sets(get_args())
            return function(*args, **kwargs)

        return wrapped

    def around_evaluate(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            losses: dict[str, torch.Tensor] = {}
            for name, way in self.observer.ways_to_evaluate():
                with way:
                    found, collected, out_of_time = function(*args, **kwargs)
                if out_of_time:
                    return found, collected, out_of_time
                losses |= {f"{name}{key}": value for key, value in found.items()}
            self.observer.validated(
                losses,
                iteration=self.iteration,
                title=self.title + next(self.sets),
                seconds=time.perf_counter() - start,
            )
            return losses, collected, out_of_time

        return wrapped


def _sets(args: argparse.Namespace) -> Iterator[str]:
    """Yield what follows the title of each dataset that one call evaluates, as Megatron counts."""
    if not args.multiple_validation_sets:
        return iter([""])
    return (f" {name}" for name in args.validation_set_names or itertools.count())


@contextmanager
def _timed(observer: Observer) -> Iterator[None]:
    start = time.perf_counter()
    yield
    observer.held_up(seconds=time.perf_counter() - start)
