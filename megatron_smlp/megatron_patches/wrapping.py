"""Wrappers that several patches put around a function."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any


def after(first: Callable[[], None], function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls `first`, then `function` with its own arguments."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        first()
        return function(*args, **kwargs)

    return wrapped


@contextlib.contextmanager
def wrapped_in(module: Any, wrappers: Mapping[str, Callable[[Any], Any]]) -> Iterator[None]:
    """Wrap functions of a module by name, and put the originals back."""
    originals = {name: getattr(module, name) for name in wrappers}
    for name, wrap in wrappers.items():
        setattr(module, name, wrap(originals[name]))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(module, name, original)
