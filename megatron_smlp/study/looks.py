"""The one comparison that a study names before it begins, looked at as its seeds come in.

A look is at the first n seeds of both systems, n of LOOKS, by Student's test of two samples with
one deviation, whatever other systems and later seeds there are: made again, it ends the same. By
n seeds there is spent of alpha, as Lan and DeMets did after O'Brien and Fleming, two-sided,

    spent(n) = 4 (1 - Phi(z(1 - alpha/4) / sqrt(n / 8)))

and a look may take what is spent since the one before. That is Bonferroni's bound over looks, which
holds for Student's test of any n; boundaries of joint normal values would use more of alpha.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from megatron_smlp.study.statistics import (
    ALPHA,
    CONFIRMED,
    LEVEL,
    REFUTED,
    UNDECIDED,
    Difference,
    level,
    of_error,
    unknown,
)

LOOKS = (3, 5, 8)
"""Seeds of each of the two systems."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """A comparison at one look, with an interval that holds over all looks."""

    found: Difference
    spent: float
    """Of alpha, by the end of this look."""
    alpha: float
    """What this look may take of it."""
    verdict: str


def spent(n: int) -> float:
    """Return how much of ALPHA is spent by the looks at up to so many seeds."""
    return float(4 * stats.norm.sf(stats.norm.isf(ALPHA / 4) / math.sqrt(n / LOOKS[-1])))


def looks(left: Sequence[float], right: Sequence[float]) -> list[Look]:
    """Return the looks that were made, of losses in the order of the seeds; the last one decides.

    None follows one that decides, unless that is at the last.
    """
    made: list[Look] = []
    for n in LOOKS:
        if len(left) < n or len(right) < n or (made and made[-1].verdict != UNDECIDED):
            break
        difference = _student(left[:n], right[:n])
        alpha = spent(n) - (made[-1].spent if made else 0)
        made.append(look(difference, alpha=alpha, spent=spent(n)))
    return made


def look(difference: Difference, *, alpha: float, spent: float) -> Look:
    """Return how a comparison ends at a look; level only at the last, when all is spent."""
    if difference.p < alpha:
        said = CONFIRMED if difference.mean < 0 else REFUTED
    else:
        is_last = math.isclose(spent, ALPHA)
        said = LEVEL if is_last and level(difference) < ALPHA else UNDECIDED
    widened = of_error(
        difference.mean, difference.error, df=difference.df, n=difference.n, alpha=alpha
    )
    return Look(found=widened, spent=spent, alpha=alpha, verdict=said)


def _student(left: Sequence[float], right: Sequence[float]) -> Difference:
    """Return `left` minus `right`, of as many values."""
    n, sides = len(left), np.array([left, right], dtype=np.float64)
    mean = float(np.subtract(*sides.mean(axis=1)))
    if not np.isfinite(sides).all():
        return unknown(mean, n)
    error = math.sqrt(float(sides.var(axis=1, ddof=1).sum()) / n)
    return of_error(mean, error, df=2 * n - 2, n=n)
