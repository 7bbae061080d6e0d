"""Check arguments against the signatures, and record them."""

from __future__ import annotations

from typing import Any

from .signatures import MODULES

CALLS: list[tuple[str, dict[str, Any]]] = []
"""Each call of a constructor or function, with its keyword arguments."""


def record(name: str, given: dict[str, Any]) -> None:
    """Keep a call.

    Raises:
        TypeError: Transformer Engine's module has no such argument.
    """
    if name in MODULES and (unknown := set(given) - set(MODULES[name].split())):
        raise TypeError(f"{name}: unknown arguments {sorted(unknown)}")
    CALLS.append((name, given))
