"""A part of a matrix of cases in which every pair of values that matters still meets.

`make test` runs that part, `make test-slow` the rest of the matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import pytest

type Facets = Mapping[str, Hashable]


def pairs(facets: Facets, axes: Iterable[tuple[str, ...]]) -> set[tuple[Hashable, ...]]:
    """Return the values that a case has along each of these groups of axes."""
    return {(*group, *(facets[axis] for axis in group)) for group in axes}


def cover[Case](
    cases: Sequence[Case], facets: Callable[[Case], Facets], axes: Sequence[tuple[str, ...]]
) -> list[Case]:
    """Return few of the cases, in their order: all values along each group of axes are in them.

    Greedy: the case with the most new values comes next, the first of equals.
    """
    values = [pairs(facets(case), axes) for case in cases]
    missing = set().union(*values)
    chosen: set[int] = set()
    while missing:
        best = max(range(len(cases)), key=lambda number: (len(values[number] & missing), -number))
        chosen.add(best)
        missing -= values[best]
    return [case for number, case in enumerate(cases) if number in chosen]


def slow_unless_in(chosen: Iterable[Any], cases: Iterable[Any]) -> list[Any]:
    """Return the parameters of a test: cases outside of the cover are marked slow."""
    kept = list(chosen)
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            marks=[] if case in kept else [pytest.mark.slow],
        )
        for case in cases
    ]


def selected(request: pytest.FixtureRequest, *names: str) -> set[tuple[Any, ...]]:
    """Return the values of these parameters in the tests of this file that will run.

    A fixture that makes runs for many tests makes no run that none of them looks at.
    """
    parameters = [
        item.callspec.params
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    ]
    return {
        tuple(each[name] for name in names)
        for each in parameters
        if all(name in each for name in names)
    }
