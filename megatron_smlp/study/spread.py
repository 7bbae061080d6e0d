"""Compare systems over unpaired seeds, with one pooled deviation for all but outliers.

    s^2 = sum (n_i - 1) s_i^2 / sum (n_i - 1)            over the systems that are not outliers
    one - other:  m_1 - m_2 +- t(1 - alpha/2, df) sqrt(s^2 / n_1 + s^2 / n_2),  df = sum (n_i - 1)

While the largest deviation exceeds the pooled one of the others, by an F test at AGREE over their
number, its system is marked as an outlier and keeps its own deviation; a pair with an outlier has
Welch's degrees of freedom. Seeds that lie close make no outlier: three may do so by luck.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from megatron_smlp.study.statistics import ALIKE, Difference, of_error, welch

AGREE = 0.2
"""Threshold of p: above alpha, since a missed outlier costs more than a false one."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The losses of some systems at one horizon, and how much they vary between seeds."""

    groups: Mapping[str, tuple[float, ...]]
    pooled: tuple[str, ...]
    """Systems that share one deviation."""
    outliers: tuple[str, ...]
    sd: float
    """Standard deviation of the pooled systems; NaN if no system has two seeds."""
    df: int
    p: float
    """p-value of Bartlett's test of equal deviations; NaN if fewer than two systems have one."""

    @classmethod
    def of(cls, groups: Mapping[str, Sequence[float]]) -> Spread:
        """Build it from each system's losses; infinite ones say nothing about deviations."""
        several = {
            name: np.asarray(losses, dtype=np.float64)
            for name, losses in groups.items()
            if len(losses) > 1 and np.isfinite(losses).all()
        }
        pooled = _agreeing(several)
        df, squares = _sum_of_squares(several, pooled)
        return cls(
            groups={name: tuple(map(float, losses)) for name, losses in groups.items()},
            pooled=tuple(pooled), outliers=tuple(name for name in several if name not in pooled),
            sd=math.sqrt(squares / df) if df else math.nan, df=df,
            p=bartlett([(_variance(losses) * (n := len(losses) - 1), n)
                        for losses in several.values()]),
        )  # fmt: skip

    def mean(self, name: str) -> Difference:
        losses = self.groups.get(name, ())
        mean = float(np.mean(losses)) if losses else math.nan
        error, df = self._error(name)
        return of_error(mean, error, df=df, n=len(losses))

    def difference(self, system: str, rival: str) -> Difference:
        """Return `system` minus `rival`; its `n` is the smaller number of seeds of the two."""
        sides = [self.mean(name) for name in (system, rival)]
        mean, n = sides[0].mean - sides[1].mean, min(side.n for side in sides)
        errors = [self._error(name) for name in (system, rival)]
        error = math.hypot(*(error for error, _ in errors))
        own = {system, rival} & {*self.outliers}
        return of_error(mean, error, df=welch(errors) if own else self.df, n=n)

    def _error(self, name: str) -> tuple[float, float]:
        """Return the standard error and degrees of freedom of a system's mean."""
        losses = np.asarray(self.groups.get(name, ()), dtype=np.float64)
        if not len(losses) or not np.isfinite(losses).all():
            return math.nan, math.nan
        if name in self.outliers:
            return math.sqrt(_variance(losses) / len(losses)), len(losses) - 1
        return self.sd / math.sqrt(len(losses)), self.df


def _agreeing(groups: Mapping[str, np.ndarray]) -> list[str]:
    names = list(groups)
    while len(names) > 1:
        largest = max(names, key=lambda name: _variance(groups[name]))
        rest = [name for name in names if name != largest]
        if len(names) * _p_of_more(groups, largest, rest) >= AGREE:
            break
        names = rest
    return names


def _p_of_more(groups: Mapping[str, np.ndarray], name: str, rest: Sequence[str]) -> float:
    """Return the p-value of a deviation this large, given the pooled deviation of the rest."""
    df, squares = _sum_of_squares(groups, rest)
    variance = _variance(groups[name])
    if variance == 0:
        return 1.0
    return float(stats.f.sf(variance * df / squares, len(groups[name]) - 1, df)) if squares else 0.0


def _sum_of_squares(groups: Mapping[str, np.ndarray], names: Sequence[str]) -> tuple[int, float]:
    """Return the degrees of freedom and the sum of squares around each system's mean."""
    sizes = {name: len(groups[name]) - 1 for name in names}
    return sum(sizes.values()), sum(_variance(groups[name]) * size for name, size in sizes.items())


def bartlett(parts: Sequence[tuple[float, float]]) -> float:
    """Return the p-value of Bartlett's test of equal deviations, from sums of squares and their
    degrees of freedom; NaN for fewer than two, and 0 if some but not all deviations are zero."""
    if len(parts) < 2:
        return math.nan
    squares, dfs = np.array(parts, dtype=np.float64).T
    if not squares.all():
        return float(not squares.any())
    df, k = dfs.sum(), len(dfs)
    statistic = df * np.log(squares.sum() / df) - dfs @ np.log(squares / dfs)
    scale = 1 + ((1 / dfs).sum() - 1 / df) / (3 * (k - 1))
    return float(stats.chi2.sf(statistic / scale, k - 1))


def _variance(losses: np.ndarray) -> float:
    variance = float(np.var(losses, ddof=1))
    return variance if math.sqrt(variance) > ALIKE * abs(float(np.mean(losses))) else 0.0
