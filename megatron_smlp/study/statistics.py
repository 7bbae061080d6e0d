"""Statistics of a study: confidence intervals, smallest detectable differences, and verdicts.

spread.py and rates.py compare losses. Paired measurements, such as times to a loss by seed or step
times by round, have with n pairs and the mean m and deviation sd of their differences d_s:

    interval  m +- t(1 - alpha/2, n - 1) sd / sqrt(n), Student's
    p         Student's, two-sided
    visible   delta sd / sqrt(n), with P(T(df, delta) > t(1 - alpha/2k, df)) = power, T being
              noncentral Student's: the smallest true difference that as many seeds with this sd
              would find with this power; k is 1 in a claim that all comparisons hold, which is
              confirmed at plain alpha, and else their number, for the first of Holm's steps
    level     both one-sided tests, of more than -MARGIN and of less than MARGIN, reject (TOST)

A sum of two independent means has Welch's interval, such as the log of a token ratio over seeds
plus that of a step-time ratio over rounds; so has a mean over seeds that share their questions:

    se^2 = se_1^2 + se_2^2,    df = se^4 / (se_1^4 / (n_1 - 1) + se_2^4 / (n_2 - 1))

With three seeds its coverage is 92 to 95 %, lowest when the second error is a third of the first;
with two seeds, as low as 87 %.

docs/decisions/0079-intervals-of-a-study.md says why there is no bootstrap, 0082 why verdicts
are as they are.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import optimize, stats

ALPHA = 0.05
POWER = 0.8
MOST_DF = 1e6  # as good as infinity
ALIKE = 1e-14  # of the mean: smaller deviations are rounding alone
MARGIN = 0.03
"""Largest difference in nats that is negligible: two systems within it are level."""
LEAST_FOR_VERDICT = 3  # seeds: two that agree by chance would be called significant
CONFIRMED, REFUTED, UNDECIDED, LEVEL = "confirmed", "refuted", "undecided", "level"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One system minus another, or the mean of one."""

    mean: float
    low: float
    high: float
    p: float
    """p-value of no difference; 1 if there are too few seeds."""
    n: int
    """Number of seeds of the system that has fewer."""
    error: float
    """Standard error of the mean, or of a ratio's logarithm; NaN if it is not known."""
    df: float
    """Degrees of freedom of its interval."""
    visible: float | None = None
    """The smallest difference that this many seeds can detect, infinite for one seed. It depends on
    how many comparisons a claim has, so `with_holm` sets it; None before."""
    holm: float = 1.0
    """p after Holm's steps over the comparisons of a claim, set by `with_holm`; 1 before."""


def paired(left: Mapping[int, float], right: Mapping[int, float]) -> Difference:
    """Return `left` minus `right` over their common seeds; `unknown` if a value is infinite."""
    seeds = sorted(set(left) & set(right))
    values = np.array([left[seed] - right[seed] for seed in seeds], dtype=np.float64)
    n = len(values)
    mean = float(np.mean(values)) if n else math.nan
    if n < 2 or not np.isfinite(values).all():
        return unknown(mean, n)
    sd = float(np.std(values, ddof=1))
    error = sd / math.sqrt(n) if sd > ALIKE * abs(mean) else 0.0
    return of_error(mean, error, df=n - 1, n=n)


def unknown(mean: float, n: int) -> Difference:
    return Difference(
        mean=mean, low=-math.inf, high=math.inf, p=1.0, n=n, error=math.nan, df=math.nan
    )


def visible(difference: Difference, *, comparisons: int = 1) -> float:
    """Return the smallest difference that as many seeds with this deviation detect with POWER, at
    ALPHA over the number of comparisons, as Holm's first step requires."""
    if not math.isfinite(difference.error):
        return math.inf
    critical = stats.t.ppf(1 - ALPHA / comparisons / 2, difference.df)
    shift = optimize.brentq(
        lambda shift: stats.nct.sf(critical, difference.df, shift) - POWER, 0, 10 * critical
    )
    return float(shift * difference.error)


def plus(left: Difference, right: Difference) -> Difference:
    """Return the sum of two independent means; `n` is that of `left`."""
    return with_error(replace(left, mean=left.mean + right.mean), right.error, df=right.df)


def with_error(difference: Difference, error: float, *, df: float = math.inf) -> Difference:
    """Add another, independent error to that of a mean.

    Args:
        error: standard error; NaN, if it is not known, makes the result `unknown`.
        df: its degrees of freedom.
    """
    df = welch([(difference.error, difference.df), (error, df)])
    both = math.hypot(difference.error, error)
    return of_error(difference.mean, both, df=df, n=difference.n)


def welch(parts: Sequence[tuple[float, float]]) -> float:
    """Return the degrees of freedom of a sum, given each part's standard error and degrees."""
    spread = sum(error**4 / df for error, df in parts if error > 0)
    whole = sum(error**2 for error, _ in parts) ** 2
    return min(MOST_DF, whole / spread) if spread else MOST_DF


def of_error(mean: float, error: float, *, df: float, n: int, alpha: float = ALPHA) -> Difference:
    """Return a mean's interval and p by its standard error; `unknown` if either is not finite."""
    if not math.isfinite(mean + error):
        return unknown(mean, n)
    if error == 0:
        return Difference(mean=mean, low=mean, high=mean, p=float(mean == 0), n=n, error=0, df=df)
    half = float(stats.t.ppf(1 - alpha / 2, df)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, df))
    return Difference(mean=mean, low=mean - half, high=mean + half, p=p, n=n, error=error, df=df)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm-adjusted p-values, which hold for all comparisons jointly, in the given order."""
    order = np.argsort(p_values)
    factors = len(p_values) - np.arange(len(p_values))
    adjusted = np.maximum.accumulate(np.minimum(1.0, np.asarray(p_values)[order] * factors))
    result = np.empty(len(p_values))
    result[order] = adjusted
    return [float(p) for p in result]


def with_holm[K](
    differences: Mapping[K, Difference], *, is_conjunction: bool = True
) -> dict[K, Difference]:
    """Return the comparisons of one claim with p-values that hold for all of them jointly, and with
    what is visible: at plain alpha if the claim is that all hold, else at Holm's first step.
    """
    adjusted = holm([difference.p for difference in differences.values()])
    count = 1 if is_conjunction else len(differences)
    return {
        name: replace(difference, holm=p, visible=visible(difference, comparisons=count))
        for (name, difference), p in zip(differences.items(), adjusted, strict=True)
    }


def verdict(difference: Difference, *, null: float = 0.0) -> str:
    """Return the verdict on a claim of less than `null`, by the unadjusted p.

    With fewer than three seeds it is always undecided.
    """
    if difference.p >= ALPHA or difference.n < LEAST_FOR_VERDICT:
        return UNDECIDED
    return CONFIRMED if difference.high < null else REFUTED


def verdicts[K](
    differences: Mapping[K, Difference],
    *,
    null: float = 0.0,
    is_conjunction: bool = True,
    margin: float = 0.0,
) -> dict[K, str]:
    """Return the verdict on each of `with_holm`'s comparisons.

    A claim that all hold is an intersection-union test: if each passes at plain alpha, each is
    confirmed. Otherwise Holm's steps decide which ones are confirmed or refuted.

    Args:
        margin: within which two systems are level if otherwise undecided; 0 for never.
    """
    plain = {name: verdict(difference, null=null) for name, difference in differences.items()}
    if is_conjunction and set(plain.values()) == {CONFIRMED}:
        return plain
    return {
        name: _or_level(
            verdict(replace(difference, p=difference.holm), null=null), difference, margin
        )
        for name, difference in differences.items()
    }


def _or_level(said: str, difference: Difference, margin: float) -> str:
    is_level = difference.n >= LEAST_FOR_VERDICT and level(difference, margin=margin) < ALPHA
    return LEVEL if said == UNDECIDED and is_level else said


def level(difference: Difference, *, margin: float = MARGIN) -> float:
    """Return the p-value of a difference of `margin` or more either way: two one-sided tests."""
    if not math.isfinite(difference.error):
        return 1.0
    room = margin - abs(difference.mean)
    if difference.error == 0:
        return float(room <= 0)
    return float(stats.t.sf(room / difference.error, difference.df))


def why_undecided(difference: Difference, *, null: float, unit: str = "seeds") -> str:
    """Explain why `verdicts` leaves a comparison undecided; `unit` is what its `n` counts."""
    if difference.n < LEAST_FOR_VERDICT:
        return f"{difference.n} of the {LEAST_FOR_VERDICT} {unit} that a verdict takes"
    if not math.isfinite(difference.high):
        return "no interval, as something is not finite or not known"
    if difference.low <= null <= difference.high:
        return f"the 95 % interval holds {null:g}"
    alone = f"the interval of this pair alone leaves out {null:g}"
    return f"p is {difference.holm:.3g} after Holm's steps; {alone}"


def verdict_of_all(verdicts: Sequence[str]) -> str:
    """Return the verdict on a claim of several comparisons: all must hold; any can refute it."""
    if REFUTED in verdicts:
        return REFUTED
    if not verdicts or UNDECIDED in verdicts:
        return UNDECIDED
    return LEVEL if LEVEL in verdicts else CONFIRMED


def cost_to_reach(costs: Sequence[float], losses: Sequence[float], target: float) -> float:
    """Return the cost at which a curve first reaches the target, by linear interpolation.

    Args:
        costs: the cost of each point, such as tokens or seconds, ascending.
        losses: losses of converged points, one per cost.

    Returns:
        infinity if no point reaches the target; the cost of the first that does if nothing finite
        lies before it, see `is_upper_bound`.
    """
    for place, loss in enumerate(losses):
        if loss <= target:
            if loss == target or is_upper_bound(losses, target):
                return float(costs[place])
            share = (losses[place - 1] - target) / (losses[place - 1] - loss)
            return float(costs[place - 1] + share * (costs[place] - costs[place - 1]))
    return math.inf


def is_upper_bound(losses: Sequence[float], target: float) -> bool:
    """Return whether a curve may have reached the target before its first point there, because that
    point is the curve's first, or follows one that diverged."""
    first = next((place for place, loss in enumerate(losses) if loss <= target), None)
    return first is not None and (first == 0 or not math.isfinite(losses[first - 1]))


def log_ratio(left: Mapping[int, float], right: Mapping[int, float]) -> Difference:
    """Return the mean over seeds of log(`left` / `right`); `exponential` turns it into a ratio.

    With an infinite value the interval is unbounded.
    """
    logs = [{seed: math.log(value) for seed, value in side.items()} for side in (left, right)]
    return paired(logs[0], logs[1])


def exponential(logarithms: Difference) -> Difference:
    """Return a ratio, as a geometric mean; `error`, and so `visible`, remain of the logarithms."""
    mean, low, high = (math.exp(x) for x in (logarithms.mean, logarithms.low, logarithms.high))
    return replace(logarithms, mean=mean, low=low, high=high)


def crossings(own: Sequence[float], rival: Sequence[float], costs: Sequence[float]) -> list[float]:
    """Return the costs at which two curves over the same costs cross, by linear interpolation;
    points where either curve is not finite are left out."""
    gaps = np.asarray(own, dtype=np.float64) - np.asarray(rival, dtype=np.float64)
    points = [pair for pair in zip(costs, gaps, strict=True) if math.isfinite(pair[1])]
    places = []
    for (cost, gap), (next_cost, next_gap) in itertools.pairwise(points):
        if gap * next_gap < 0:
            places.append(float(cost + gap / (gap - next_gap) * (next_cost - cost)))
    return places
