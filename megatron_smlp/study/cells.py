"""What a report says of a number: cells and rows of its tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from megatron_smlp.study.statistics import Difference
from megatron_smlp.study.verdicts import Comparison


def visible(comparison: Comparison) -> str:
    value = comparison.found.visible
    if value is None:
        return "n/a"
    return number(math.exp(value) if comparison.is_ratio and math.isfinite(value) else value)


def mean_of(estimate: Difference, losses: Sequence[float]) -> str:
    """Return a mean with its interval, of these losses."""
    if not losses:
        return "missing"
    if not math.isfinite(estimate.mean):
        wrong = sum(not math.isfinite(loss) for loss in losses)
        return f"diverged ({wrong} of {len(losses)})" if wrong else "no minimum"
    half = (estimate.high - estimate.low) / 2
    return f"{estimate.mean:.3f}" + (f" ± {half:.3f}" if math.isfinite(half) else "")


def seeds(cells: Sequence[Mapping[int, float]]) -> str:
    """Return of how many seeds the means in a row are."""
    least, most = (bound(map(len, cells)) for bound in (min, max))
    return f"{least}" if least == most else f"{least} to {most}"


def deviation(losses: Mapping[int, float]) -> float:
    """Return that of the seeds that did not diverge; NaN of fewer than two."""
    finite = [loss for loss in losses.values() if math.isfinite(loss)]
    return float(np.std(finite, ddof=1)) if len(finite) > 1 else math.nan


def plain_mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def number(value: float, form: str = ".3g") -> str:
    if math.isnan(value):
        return "n/a"
    return format(value, form) if math.isfinite(value) else ("∞" if value > 0 else "-∞")


def listed(titles: Iterable[str]) -> str:
    """Return titles, which may have commas, as a list in a sentence."""
    return ", ".join(f"*{title}*" for title in titles)


def table(*heads: str) -> Iterator[str]:
    yield row(*heads)
    yield row(*("---" for _ in heads))


def row(*cells: object) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def not_reached(comparison: Comparison) -> str:
    """Return of how many seeds no speed-up is known: without them it would be of the fast ones."""
    return f"not reached by {comparison.unreached} of {comparison.found.n} seeds"


def speedup(comparison: Comparison) -> tuple[float, float, float]:
    """Return the inverse of a ratio of costs, and its interval; 0: never reached."""
    difference = comparison.found
    return _inverse(difference.mean), _inverse(difference.high), _inverse(difference.low)


def _inverse(value: float) -> float:
    return 1 / value if value else math.inf
