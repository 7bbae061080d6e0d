"""Check arguments against the signatures, and record them."""

from __future__ import annotations

from typing import Any, NamedTuple

from .signatures import FUNCTIONS, MODULES


class Call(NamedTuple):
    """One call of a constructor or function, with its keyword arguments."""

    name: str
    given: dict[str, Any]


CALLS: list[Call] = []


def record(name: str, given: dict[str, Any]) -> None:
    """Keep a call.

    Raises:
        TypeError: Transformer Engine has no such argument, or a required one is missing.
    """
    signature = (MODULES | FUNCTIONS)[name]
    unknown = set(given) - {*signature.required, *signature.optional}
    missing = set(signature.required) - set(given)
    if unknown or missing:
        raise TypeError(f"{name}: unknown arguments {sorted(unknown)}, missing {sorted(missing)}")
    CALLS.append(Call(name, given))
