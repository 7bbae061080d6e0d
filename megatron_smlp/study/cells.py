"""Format numbers as the cells and rows of a report's tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from megatron_smlp.study.statistics import Difference
from megatron_smlp.study.verdicts import Comparison


def visible(comparison: Comparison) -> str:
    value = comparison.difference.visible
    if value is None:
        return "n/a"
    return number(math.exp(value) if comparison.is_ratio and math.isfinite(value) else value)


def mean_of(estimate: Difference, losses: Sequence[float]) -> str:
    """Format the mean of these losses with its interval, or say why there is none."""
    if not losses:
        return "missing"
    if not math.isfinite(estimate.mean):
        wrong = sum(not math.isfinite(loss) for loss in losses)
        return f"diverged ({wrong} of {len(losses)})" if wrong else "no fit"
    half = (estimate.high - estimate.low) / 2
    return f"{estimate.mean:.3f}" + (f" ± {half:.3f}" if math.isfinite(half) else "")


def seeds(cells: Sequence[Mapping[int, float]]) -> str:
    """Return how many seeds the means in a row are taken over, as a number or a range."""
    least, most = (bound(map(len, cells)) for bound in (min, max))
    return f"{least}" if least == most else f"{least} to {most}"


def deviation(losses: Mapping[int, float]) -> float:
    """Return the standard deviation over seeds that did not diverge; NaN for fewer than two."""
    finite = [loss for loss in losses.values() if math.isfinite(loss)]
    return float(np.std(finite, ddof=1)) if len(finite) > 1 else math.nan


def plain_mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def number(value: float, form: str = ".3g") -> str:
    if math.isnan(value):
        return "n/a"
    return format(value, form) if math.isfinite(value) else ("∞" if value > 0 else "-∞")


def listed(titles: Iterable[str]) -> str:
    """Join titles for use in a sentence; italics set them apart, since they may contain commas."""
    return ", ".join(f"*{title}*" for title in titles)


def table(*heads: str) -> Iterator[str]:
    yield row(*heads)
    yield row(*("---" for _ in heads))


def row(*cells: object) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def not_reached(comparison: Comparison) -> str:
    """Say how many seeds have no speed-up: a mean would be of the fast ones only."""
    n = comparison.difference.n
    return "not reached" + (f" by {comparison.unreached} of {n} seeds" if n > 1 else "")


def speedup(comparison: Comparison) -> tuple[float, float, float]:
    """Return a speed-up (the inverse of a cost ratio) and its interval; 0 means never reached."""
    difference = comparison.difference
    return _inverse(difference.mean), _inverse(difference.high), _inverse(difference.low)


def _inverse(value: float) -> float:
    return 1 / value if value else math.inf
