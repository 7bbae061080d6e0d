"""Wraps functions temporarily."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def wrapped_in(*wrappers: tuple[Any, str, Callable[[Any], Any]]) -> Iterator[None]:
    """Wrap attributes, each an (owner, name, wrapper), and restore the originals at the end."""
    originals = [(owner, name, vars(owner)[name]) for owner, name, _ in wrappers]
    for owner, name, wrap in wrappers:
        setattr(owner, name, wrap(getattr(owner, name)))
    try:
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)
