"""Hooks into a training: listeners observe, updates change state.

A `Listener` is told what happened and changes nothing that a step reads. An `Update` changes state
at one fixed place: inside a step, after the optimizer's update (training/step.py). Both are called
on every rank, in lockstep.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

if TYPE_CHECKING:  # a listener may be defined before Megatron is patched: no import of it here
    from megatron_smlp.training.parts import Parts

type Scores = dict[str, dict[str, float | None]]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outcome of one step."""

    iteration: int
    """Number of the step, counted from 1."""
    losses: Mapping[str, Tensor]
    """<float>[], means over the tokens of the global batch; on the last pipeline stage only."""
    learning_rate: float | None
    """The rate of this step's update; None on a rank without parameters."""
    grad_norm: float | None
    """Before clipping; None if the update was skipped."""
    num_zeros: float | None
    """Zeros in the gradient, with --log-num-zeros-in-grad."""
    skipped: bool
    """Whether the update was skipped."""
    loss_scale: float


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The result of evaluating one dataset."""

    iteration: int
    title: str
    """`validation`, `test`, or `validation NAME` with --multiple-validation-sets."""
    losses: Mapping[str, Tensor]
    """<float>[] by name; on the last pipeline stage only."""
    loads: Mapping[Any, Any]
    """The routers' loads during the evaluation, by layer and kind."""
    seconds: float


class Listener:
    """Base class of whatever observes a training; override the methods you need."""

    def built(self, parts: Parts) -> None:
        """Observe the parts: model, optimizer and schedule are built, the checkpoint is loaded."""

    def ready(self) -> None:
        """Prepare for the first step, which comes next: all ranks have their data."""

    def stepped(self, outcome: Outcome) -> None:
        """Observe a finished step; its samples are already counted."""

    def evaluated(self, evaluation: Evaluation) -> None:
        """Observe the evaluation of one dataset."""

    def scored(self, scores: Scores, texts: list[str], *, iteration: int, seconds: float) -> None:
        """Observe the scores of zero-shot tasks: numbers by task, and a text for each task."""

    def held_up(self, *, seconds: float) -> None:
        """Observe time spent outside steps: evaluation, tasks, the blocking part of a save."""

    def stopping(self, iteration: int, reason: str) -> None:
        """Observe that the run ends before its last step, saved if there is a folder for it."""


class Listeners(Listener):
    """Several listeners, called in order."""

    def __init__(self, members: Sequence[Listener]) -> None:
        for event in ("built", "ready", "stepped", "evaluated", "scored", "held_up", "stopping"):
            setattr(self, event, _each([getattr(member, event) for member in members]))


def _each(methods: Sequence[Callable[..., None]]) -> Callable[..., None]:
    def tell(*args: Any, **kwargs: Any) -> None:
        for method in methods:
            method(*args, **kwargs)

    return tell


class Tasks(Protocol):
    """Zero-shot tasks scored during training. Every method is collective."""

    def built(self, model: Sequence[Any]) -> None: ...

    def is_due(self, iteration: int) -> bool: ...

    def scores(self) -> tuple[Scores, list[str]]:
        """Score all tasks.

        Returns:
            numbers by task for metrics.jsonl, and a text for each task.
        """


class Update(Protocol):
    """Changes model state once per step, such as BASE's prices or a plugin's own rule."""

    def __call__(self, models: Sequence[Any], /, *, skipped: bool) -> None:
        """models: this rank's chunks; skipped: the weights were not updated. Collective."""
