"""The rows to score, their scores, and the interface of a scorer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

Progress = Callable[[int], None]
"""Called with the number of rows done so far."""


@dataclass(frozen=True)
class Row:
    """One sequence to score."""

    tokens: tuple[int, ...]
    """At most T + 1: the last one is only predicted."""
    scored: int
    """Number of trailing tokens to score; at least one token precedes them."""


@dataclass(frozen=True)
class RowScore:
    """Scores of a row's scored tokens, in order."""

    logprobs: tuple[float, ...]
    """log p of each token, given all tokens before it; natural logarithms."""
    greedy: tuple[bool, ...]
    """For each token, whether it was the likeliest one."""


class Scorer(Protocol):
    """A model that scores rows."""

    @property
    def longest(self) -> int:
        """T, the most tokens that the model reads at once."""

    def score(self, rows: Sequence[Row], *, progress: Progress | None = None) -> list[RowScore]:
        """Return the score of each row, which does not depend on the other rows."""
