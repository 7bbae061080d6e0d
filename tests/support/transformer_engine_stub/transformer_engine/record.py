"""Holds arguments against the signatures and keeps them."""

from __future__ import annotations

from typing import Any, NamedTuple

from .signatures import FUNCTIONS, MODULES


class Call(NamedTuple):
    """One constructor or function with what it was given by name."""

    name: str
    given: dict[str, Any]


CALLS: list[Call] = []


def record(name: str, given: dict[str, Any]) -> None:
    """Keep a call.

    Raises:
        TypeError: Transformer Engine's own has no such argument, or one is missing.
    """
    signature = (MODULES | FUNCTIONS)[name]
    unknown = set(given) - {*signature.required, *signature.optional}
    missing = set(signature.required) - set(given)
    if unknown or missing:
        raise TypeError(f"{name}: unknown arguments {sorted(unknown)}, missing {sorted(missing)}")
    CALLS.append(Call(name, given))
