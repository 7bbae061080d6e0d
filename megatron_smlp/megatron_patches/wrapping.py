"""Wrappers that several patches put around a function."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def after(first: Callable[[], None], function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls `first`, then `function` with its own arguments."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        first()
        return function(*args, **kwargs)

    return wrapped
