"""What others do in a training: listeners look, updates change state.

A `Listener` is told what has happened, and changes nothing that a step reads. An `Update` changes
state at one place, inside a step, behind the optimizer's (training/step.py). Both are called on
every rank, in lockstep.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

if TYPE_CHECKING:  # a listener may be defined before Megatron is patched, and so imported
    from megatron_smlp.training.parts import Parts

type Scores = dict[str, dict[str, float | None]]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a step did."""

    iteration: int
    """Its number, from 1 on."""
    losses: Mapping[str, Tensor]
    """<float>[], means over the tokens of the global batch; on the last pipeline stage alone."""
    learning_rate: float | None
    """That it was made with; None on a rank without parameters."""
    grad_norm: float | None
    """Before clipping; None where fp16 has overflowed."""
    num_zeros: float | None
    """Zeros in the gradient, where --log-num-zeros-in-grad asks for them."""
    skipped: bool
    """Whether the update was held back."""
    loss_scale: float


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What an evaluation of one dataset found."""

    iteration: int
    title: str
    """`validation`, `test`, or `validation NAME` with --multiple-validation-sets."""
    losses: Mapping[str, Tensor]
    """<float>[] by name. On the last pipeline stage alone."""
    loads: Mapping[Any, Any]
    """What the routers did in it, by layer and kind."""
    seconds: float


class Listener:
    """Is told of a training; has the methods that it needs."""

    def built(self, parts: Parts) -> None:
        """Model, optimizer and schedule are there, and the checkpoint is loaded."""

    def ready(self) -> None:
        """All ranks have their data, and the first step comes next."""

    def stepped(self, outcome: Outcome) -> None:
        """Hear of a step whose samples are counted."""

    def evaluated(self, evaluation: Evaluation) -> None:
        """Hear of the evaluation of one dataset."""

    def scored(self, scores: Scores, texts: list[str], *, iteration: int, seconds: float) -> None:
        """Hear of zero-shot tasks: numbers by task, and a text for each."""

    def held_up(self, *, seconds: float) -> None:
        """Something beside steps took time: an evaluation, tasks, the part of a save that waits."""

    def stopping(self, iteration: int) -> None:
        """Hear that the run ends before its last step, saved where there is a folder for it."""


class Listeners(Listener):
    """Several, told in their order."""

    def __init__(self, members: Sequence[Listener]) -> None:
        for event in ("built", "ready", "stepped", "evaluated", "scored", "held_up", "stopping"):
            setattr(self, event, _each([getattr(member, event) for member in members]))


def _each(methods: Sequence[Callable[..., None]]) -> Callable[..., None]:
    def tell(*args: Any, **kwargs: Any) -> None:
        for method in methods:
            method(*args, **kwargs)

    return tell


class Tasks(Protocol):
    """Zero-shot tasks that are scored during training. Every method is collective."""

    def built(self, model: Sequence[Any]) -> None: ...

    def is_due(self, iteration: int) -> bool: ...

    def scores(self) -> tuple[Scores, list[str]]:
        """Score them all, with parameters that are whole.

        Returns:
            numbers by task for metrics.jsonl, and a text for each task.
        """


class Update(Protocol):
    """Changes state of the model once a step: prices of BASE, a rule of a plugin's."""

    def __call__(self, models: Sequence[Any], /, *, skipped: bool) -> None:
        """models: this rank's chunks; skipped: the weights were not updated. Collective."""
