"""Split a matrix of cases: `make test` runs a part, `make test-slow` runs the rest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_unless_in(chosen: Iterable[Any], cases: Iterable[Any]) -> list[Any]:
    """Return the parameters of a test, with all but the chosen cases marked slow."""
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

    With them, a fixture that trains for many tests skips the runs that no selected test looks at.
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
