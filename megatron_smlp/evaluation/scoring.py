"""What a model answers: log p of the last tokens of a row, given all tokens before them.

A score belongs to its row alone: it must not depend on the rows beside it, on their order, or on
how many go through the model at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Row:
    """One sequence to score."""

    tokens: tuple[int, ...]
    """At most T + 1: the last one is only predicted."""
    scored: int
    """How many of the last tokens are scored; at least one token comes before them."""


@dataclass(frozen=True)
class RowScore:
    """Of the scored tokens, in their order."""

    logprobs: tuple[float, ...]
    """Natural logarithms."""
    greedy: tuple[bool, ...]
    """Whether each was the likeliest token."""


Progress = Callable[[int], None]
"""Called with the number of rows done so far."""


class Scorer(Protocol):
    """A model that scores rows."""

    @property
    def longest(self) -> int:
        """T, tokens that go in at once."""

    def score(self, rows: Sequence[Row], *, progress: Progress | None = None) -> list[RowScore]:
        """The score of each row, on every rank. Collective: all ranks call it with the same."""
