"""Fit a parabola per system to the losses of runs at several rates, each with its own seed.

    loss = a_i + b_i x + c x^2 + e,    x = log2(rate / the rate of system i's file)

with one curvature c for all systems. A system is compared by its lowest fitted loss within the
rates that were trained: at x_i = -b_i / 2c, or where that lies outside of them, or c is not
positive, at one of their ends,

    m_i = a_i + b_i x_i + c x_i^2,    dm_i/da_i = 1,  dm_i/db_i = x_i,  dm_i/dc = x_i^2

whose error, and that of differences, follows from these derivatives and the least-squares
covariance, with runs minus coefficients degrees of freedom. The interval thus covers the choice of
the rate among these. It also covers that curvatures differ, independently by BENDS c: the minimum
then moves by the sum over a system's runs of their influence times BENDS c (x - x_i)^2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_smlp.plotting.series import Floats
from megatron_smlp.study.spread import bartlett
from megatron_smlp.study.statistics import Difference, of_error, unknown, with_error
from megatron_smlp.study.study_file import LEAST_RATES

BENDS = 0.25
"""Standard deviation of the systems' curvatures over their mean: 0.30 in the trials of `cpu`, from
0.028 to 0.064 nats per octave squared, of which a part is the trials' noise."""
Point = tuple[float, float]
"""A multiple of the rate in a system's file, and the loss at it."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """The minima of some systems at one horizon."""

    points: Mapping[str, Sequence[Point]]
    """Only systems with at least LEAST_RATES finite losses; the others are not fitted."""
    curvature: float
    """In nats per octave squared."""
    sd: float
    """Standard deviation of runs around their parabola; NaN if no degree of freedom is left."""
    df: int
    p: float
    """p-value of Bartlett's test of equal deviations of all systems; NaN for fewer than two."""
    solution: Floats
    """<float64>[2 systems + 1]: each system's a and b, then c."""
    rows: Floats
    """<float64>[runs, 2 systems + 1]: the design matrix of the least squares."""
    inverse: Floats
    """Covariance of the solution divided by sd squared."""
    residuals: Floats
    """<float64>[runs]"""

    @classmethod
    def of(cls, groups: Mapping[str, Sequence[Point]]) -> Rates:
        """Fit all systems jointly, leaving out losses that are not finite."""
        finite = {
            name: [point for point in points if math.isfinite(point[1])]
            for name, points in groups.items()
        }
        points = {name: own for name, own in finite.items() if len(own) >= LEAST_RATES}
        rows, losses = _equations(points)
        size = 2 * len(points) + 1
        solution, *_ = np.linalg.lstsq(rows, losses) if points else (np.full(size, math.nan),)
        inverse = np.linalg.pinv(rows.T @ rows)
        df = len(losses) - size
        residuals = losses - rows @ solution
        sd = math.sqrt(residuals @ residuals / df) if df > 0 else math.nan
        ends = np.cumsum([len(own) for own in points.values()])[:-1]
        # Each system's own coefficients take two degrees of freedom; all share the curvature's.
        parts = [
            (float(own @ own), len(own) - 2 - 1 / len(points))
            for own in np.split(residuals, ends)
            if points
        ]
        return cls(
            points=points, curvature=float(solution[-1]), sd=sd, df=max(0, df),
            p=bartlett(parts) if df > 0 else math.nan,
            solution=solution, rows=rows, inverse=inverse, residuals=residuals,
        )  # fmt: skip

    @property
    def at_edge(self) -> list[str]:
        """Return the systems whose best rate is the lowest or highest one that was trained."""
        return [name for name in self.points if self.best(name) in self._ends(name)]

    def best(self, name: str) -> float:
        """Return the best of the trained range of rates, by the fit, as a multiple of the rate in a
        system's file; NaN without a fit."""
        if name not in self.points:
            return math.nan
        low, high = self._ends(name)
        slope = self.solution[self._place(name) + 1]
        if self.curvature > 0:
            exponent = -slope / (2 * self.curvature)
            if math.log2(low) < exponent < math.log2(high):
                return float(2**exponent)
        return low if self._fitted(name, low) < self._fitted(name, high) else high

    def _ends(self, name: str) -> tuple[float, float]:
        rates = [rate for rate, _ in self.points[name]]
        return min(rates), max(rates)

    def _fitted(self, name: str, rate: float) -> float:
        """Return the fitted loss at a multiple of a system's rate."""
        a, b = self.solution[self._place(name) :][:2]
        x = math.log2(rate)
        return float(a + b * x + self.curvature * x**2)

    def mean(self, name: str) -> Difference:
        return self._weighted({name: 1})

    def difference(self, system: str, rival: str) -> Difference:
        """Return `system` minus `rival`; its `n` is the smaller number of runs of the two."""
        return self._weighted({system: 1, rival: -1})

    @classmethod
    def slope(
        cls, fits: Sequence[Rates], x: Sequence[float], system: str, rival: str
    ) -> Difference:
        """Return the slope over x of `system` minus `rival`, from the same runs at each x.

        A run's deviations at different x are correlated, so that with the covariance S of the
        residuals, the gradients G of the differences and the least-squares weights w

            slope = sum w_h d_h,    error^2 = sum w_h w_k S_hk (G_h inverse G_k)

        and a system's curvature deviates by the same fraction at all x.
        """
        gaps = [fit.difference(system, rival) for fit in fits]
        if not all(math.isfinite(gap.error) for gap in gaps):
            return unknown(math.nan, min(gap.n for gap in gaps))
        weights = np.asarray(x) - np.mean(x)
        weights /= weights @ weights
        gradients = np.array([fit._gradient(system) - fit._gradient(rival) for fit in fits])
        residuals = np.array([fit.residuals for fit in fits])
        first = fits[0]
        covariance = residuals @ residuals.T / first.df * (gradients @ first.inverse @ gradients.T)
        slope = float(weights @ [gap.mean for gap in gaps])
        error = math.sqrt(max(0.0, float(weights @ covariance @ weights)))
        bent = weights @ [fit._bent(own) for fit, own in zip(fits, gradients, strict=True)]
        estimate = of_error(slope, error, df=first.df, n=gaps[0].n)
        return with_error(estimate, float(np.linalg.norm(bent)))

    def _weighted(self, weights: Mapping[str, int]) -> Difference:
        n = min(len(self.points.get(name, ())) for name in weights)
        if n == 0:
            return unknown(math.nan, n)
        gradient = np.sum([by * self._gradient(name) for name, by in weights.items()], axis=0)
        mean = sum(by * self._fitted(name, self.best(name)) for name, by in weights.items())
        error = self.sd * math.sqrt(float(gradient @ self.inverse @ gradient))
        estimate = of_error(mean, error, df=self.df, n=n)
        return with_error(estimate, float(np.linalg.norm(self._bent(gradient))))

    def _bent(self, gradient: Floats) -> Floats:
        """Return <float64>[systems]: how much the estimate with this gradient changes when the
        curvature of one system deviates by BENDS."""
        octaves = [
            np.log2([rate for rate, _ in own]) - math.log2(self.best(name))
            for name, own in self.points.items()
        ]
        influence = gradient @ self.inverse @ self.rows.T
        moved = influence * np.concatenate(octaves) ** 2
        return BENDS * abs(self.curvature) * np.add.reduceat(moved, self._starts())

    def _starts(self) -> list[int]:
        """Return the position of each system's first run."""
        return [0, *np.cumsum([len(own) for own in self.points.values()])[:-1]]

    def _place(self, name: str) -> int:
        return 2 * list(self.points).index(name)

    def _gradient(self, name: str) -> Floats:
        gradient, place = np.zeros_like(self.solution), self._place(name)
        x = math.log2(self.best(name))
        gradient[place], gradient[place + 1], gradient[-1] = 1, x, x**2
        return gradient


def _equations(points: Mapping[str, Sequence[Point]]) -> tuple[Floats, Floats]:
    """Return the least-squares design matrix and right-hand side, one row per run."""
    size, rows, losses = 2 * len(points) + 1, [], []
    for place, own in enumerate(points.values()):
        for rate, loss in own:
            row = np.zeros(size)
            x = math.log2(rate)
            row[2 * place], row[2 * place + 1], row[-1] = 1, x, x**2
            rows.append(row)
            losses.append(loss)
    return np.array(rows, dtype=np.float64).reshape(-1, size), np.array(losses, dtype=np.float64)
