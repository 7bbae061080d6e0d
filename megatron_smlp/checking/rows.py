"""A row of the table that smlp-check prints: what was compared, and how far apart it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Row:
    """One check that was made."""

    subject: str
    """The plugin's name."""
    compared: str
    apart: str
    """How far apart, as text."""
    advice: str = ""
    """What is wrong and what to do; empty: nothing."""

    @property
    def passed(self) -> bool:
        return not self.advice


Check = Callable[[], Row]


def close(subject: str, compared: str, difference: float, limit: float, advice: str) -> Row:
    """Return the row of two numbers or tensors, which may differ by so much at most."""
    return Row(
        subject=subject,
        compared=compared,
        apart=f"{difference:.1e} (at most {limit:.0e})",
        advice="" if difference <= limit else advice,  # a NaN is not
    )
