"""Break a loss down by position in the window, token frequency, repetition, and document.

    repeat(t) = max over s < t of the length of the common run that ends at s and at t

0: token t is new in its window; 1: it occurred before, after a different token; n + 1: it occurred
before after the same n tokens, so a model that looks them up can copy it. Positions are binned by
powers of two; frequencies into bins of about equally many tokens, the most frequent first.
Documents, such as books, are reported separately if there are few.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_smlp.evaluation.rows import Row, RowScore

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

LONGEST_REPEAT = 4
FREQUENCY_BINS = 5
MOST_DOCUMENTS = 100
DOCUMENT = "document"


class Breakdown:
    """Collects the scores of windows; `report` gives the mean loss of each kind of token.

    Args:
        counts: int64[V], how often each id occurs in the scored text.
        starts: int64[documents + 1], the offset of each document's first token in that text.
    """

    def __init__(self, counts: Ints, starts: Ints) -> None:
        self._rank = frequency_bins(counts, FREQUENCY_BINS)
        kinds: dict[str, Callable[[Ints, int, Ints], Ints]] = {
            "position": lambda tokens, first, _: np.arange(first, len(tokens) - 1),
            "frequency": lambda tokens, first, _: self._rank[tokens[first + 1 :]],
            "repeat": lambda tokens, first, _: repeats(tokens)[first + 1 :],
        }
        count, self._documents = len(starts) - 1, list[tuple[int, int, str]]()
        if count <= MOST_DOCUMENTS:
            self._documents = [(number, number, str(number + 1)) for number in range(count)]
            kinds[DOCUMENT] = lambda _, __, places: np.searchsorted(starts, places, "right") - 1
        self._kinds = kinds
        self._losses: list[Floats] = []
        self._values: dict[str, list[Ints]] = {name: [] for name in kinds}

    def add(self, row: Row, score: RowScore, *, place: int) -> None:
        """Add the scores of one window, the first being that of the token at offset `place`."""
        tokens = np.asarray(row.tokens, dtype=np.int64)
        first = len(tokens) - 1 - row.scored
        self._losses.append(-np.asarray(score.logprobs))
        for name, kind in self._kinds.items():
            self._values[name].append(kind(tokens, first, place + np.arange(row.scored)))

    def report(self) -> dict[str, list[dict[str, Any]]]:
        """Return the non-empty bins of `position`, `frequency`, `repeat` and `document`.

        Each has a label, its number of tokens, and the mean and standard deviation (`sd`) of their
        losses, in nats.
        """
        losses = np.concatenate(self._losses)
        values = {name: np.concatenate(arrays) for name, arrays in self._values.items()}
        powers = _powers(values["position"])
        bounds = {
            "position": powers, "frequency": FIFTHS, "repeat": REPEAT_BINS,
            DOCUMENT: self._documents,
        }  # fmt: skip
        return {name: list(_bins(losses, values[name], bounds[name])) for name in values}


FIFTHS = [(number, number, str(number + 1)) for number in range(FREQUENCY_BINS)]
REPEAT_BINS = [
    (0, 0, "new"),
    (1, 1, "seen"),
    *((n, n, f"after {n - 1}") for n in range(2, LONGEST_REPEAT)),
    (LONGEST_REPEAT, LONGEST_REPEAT, f"after {LONGEST_REPEAT - 1}+"),
]


def repeats(tokens: Ints) -> Ints:
    """Return int64[len(tokens)]: repeat(t) of each token, at most LONGEST_REPEAT."""
    length = len(tokens)
    runs = np.zeros(length + 1, dtype=np.int64)  # runs[s + 1]: the common run that ends at s and t
    longest = np.zeros(length, dtype=np.int64)
    for t in range(1, length):
        runs[1:] = np.where(tokens == tokens[t], runs[:-1] + 1, 0)
        longest[t] = runs[1 : t + 1].max()
    return np.minimum(longest, LONGEST_REPEAT)


def frequency_bins(counts: Ints, bins: int) -> Ints:
    """Return int64[V], each id's bin: about equally many occurrences per bin, frequent first."""
    order = np.argsort(-counts, kind="stable")
    before = np.cumsum(counts[order]) - counts[order]
    result = np.empty(len(counts), dtype=np.int64)
    result[order] = np.minimum(before * bins // max(1, int(counts.sum())), bins - 1)
    return result


def _powers(positions: Ints) -> list[tuple[int, int, str]]:
    last = int(positions.max())
    powers = range(int(math.log2(last + 1)) + 1)
    ends = [(2**power - 1, min(last, 2 ** (power + 1) - 2)) for power in powers]
    return [(low, high, f"{low}-{high}" if high > low else str(low)) for low, high in ends]


def _bins(
    losses: Floats, values: Ints, bounds: Sequence[tuple[int, int, str]]
) -> Iterator[dict[str, Any]]:
    for low, high, label in bounds:
        own = losses[(values >= low) & (values <= high)]
        if len(own):
            loss, sd = float(own.mean()), float(own.std())
            yield {"label": label, "tokens": len(own), "loss": loss, "sd": sd}
