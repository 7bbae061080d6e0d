"""Sequential test of a study's primary comparison, named before it begins, as its seeds come in.

A look at n seeds, n in LOOKS, is Student's two-sample t-test with pooled variance on the first n
seeds of both systems. It ignores other systems and later seeds, so that repeating it gives the same
result. The alpha spent by n seeds is that of Lan and DeMets' O'Brien-Fleming function, two-sided,

    spent(n) = 4 (1 - Phi(z(1 - alpha/4) / sqrt(n / 8)))

and a look may use what was spent since the previous one. That is Bonferroni's bound over looks,
which holds for Student's test at any n; boundaries from a joint normal distribution would use more
of alpha.
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
"""Numbers of seeds per system at which to look."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """A comparison at one look, with an interval that holds over all looks."""

    difference: Difference
    spent: float
    """Alpha spent up to and including this look."""
    alpha: float
    """Alpha that this look alone may use."""
    verdict: str


def spent(n: int) -> float:
    """Return how much of ALPHA the looks at up to n seeds spend."""
    return float(4 * stats.norm.sf(stats.norm.isf(ALPHA / 4) / math.sqrt(n / LOOKS[-1])))


def looks(left: Sequence[float], right: Sequence[float]) -> list[Look]:
    """Return the looks at losses in the order of the seeds, up to the first look that decides."""
    made: list[Look] = []
    for n in LOOKS:
        if len(left) < n or len(right) < n or (made and made[-1].verdict != UNDECIDED):
            break
        difference = _student(left[:n], right[:n])
        alpha = spent(n) - (made[-1].spent if made else 0)
        made.append(look(difference, alpha=alpha, spent=spent(n)))
    return made


def look(difference: Difference, *, alpha: float, spent: float) -> Look:
    """Return the result of a look; only the last, with all of ALPHA spent, can be level."""
    if difference.p < alpha:
        said = CONFIRMED if difference.mean < 0 else REFUTED
    else:
        is_last = math.isclose(spent, ALPHA)
        said = LEVEL if is_last and level(difference) < ALPHA else UNDECIDED
    widened = of_error(
        difference.mean, difference.error, df=difference.df, n=difference.n, alpha=alpha
    )
    return Look(difference=widened, spent=spent, alpha=alpha, verdict=said)


def _student(left: Sequence[float], right: Sequence[float]) -> Difference:
    """Return the mean of `left` minus that of `right`, two samples of equal size."""
    n, sides = len(left), np.array([left, right], dtype=np.float64)
    mean = float(np.subtract(*sides.mean(axis=1)))
    if not np.isfinite(sides).all():
        return unknown(mean, n)
    error = math.sqrt(float(sides.var(axis=1, ddof=1).sum()) / n)
    return of_error(mean, error, df=2 * n - 2, n=n)
