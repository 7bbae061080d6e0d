"""Wrappers that several patches put around a function."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any


def after(first: Callable[[], None], function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls `first`, then `function` with its own arguments."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        first()
        return function(*args, **kwargs)

    return wrapped


@contextlib.contextmanager
def wrapped_in(*wrappers: tuple[Any, str, Callable[[Any], Any]]) -> Iterator[None]:
    """Wrap attributes, each an (owner, name, wrapper), and put the originals back."""
    originals = [(owner, name, vars(owner)[name]) for owner, name, _ in wrappers]
    for owner, name, wrap in wrappers:
        setattr(owner, name, wrap(getattr(owner, name)))
    try:
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)
