"""A row of the table that smlp-check prints: what was compared, and how far apart it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


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


class DoubleStays(TorchFunctionMode):
    """Lets x.float() leave fp64 as it is: a plugin means "at least fp32" by it, and in fp64 a
    rounded number would look like a fault."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64:
            if func is torch.Tensor.float:
                return args[0]
            if func is torch.Tensor.to:
                args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        return func(*args, **(kwargs or {}))
