"""A row of the table that smlp-check prints: what was compared, and how far apart it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True, kw_only=True)
class Row:
    """The result of one check."""

    subject: str
    """The plugin's name."""
    compared: str
    apart: str
    """How far apart, as text."""
    advice: str = ""
    """What is wrong and how to fix it; empty if the check passed."""

    @property
    def passed(self) -> bool:
        return not self.advice


Check = Callable[[], Row]


def checked(check: Callable[[str, Any], Row], name: str, kind: type, *, hint: str = "") -> Row:
    """Run a check on a class; an exception that the class raises makes a failed row.

    hint: what may be the reason, unless it is a TypeError, which no size causes.
    """
    try:
        with DoubleStays():
            return check(name, kind)
    except Exception as error:  # of any kind, as the class is a user's
        hint = "" if isinstance(error, TypeError) else hint
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return wrong(name, check.__name__.strip("_").replace("_", " "), f"it raises {reason}{hint}")


def registered[Part: nn.Module](part: Part) -> Part:
    """Return a plugin's part.

    Raises:
        TypeError: a tensor of it is neither parameter nor buffer (on a CPU it would train), or is
            a complex buffer, of which a cast leaves the real part.
    """
    for name, value in vars(part).items():
        if isinstance(value, Tensor):
            raise TypeError(
                f"{type(part).__name__}.{name} is a plain tensor, which stays on the CPU and is in "
                f"no checkpoint: use self.register_buffer({name!r}, ...)."
            )
    for name, buffer in part.named_buffers():
        if buffer.is_complex():
            raise TypeError(
                f"{type(part).__name__}.{name} is a complex buffer, of which a model in bf16 keeps "
                "the real part: register torch.view_as_real of it, and combine in forward."
            )
    return part


def wrong(subject: str, compared: str, advice: str) -> Row:
    """Return a failed row for what could not be compared."""
    return Row(subject=subject, compared=compared, apart="-", advice=advice)


def gradients(subject: str, function: Callable[..., Tensor], inputs: Any, advice: str) -> Row:
    """Return the row that compares a function's gradients with finite differences."""
    compared = "gradients and finite differences, fp64"
    try:
        torch.autograd.gradcheck(function, inputs, atol=1e-6, rtol=1e-5)
    except GradcheckError as error:
        return wrong(subject, compared, f"{advice}: {' '.join(str(error).split())[:160]}")
    return Row(subject=subject, compared=compared, apart="under 1e-5")


def outside(chosen: Tensor, experts: int) -> int | None:
    """Return a choice that is not one of so many experts, if there is one."""
    others = chosen[(chosen < 0) | (chosen >= experts)]
    return int(others[0]) if len(others) else None


def close(subject: str, compared: str, difference: float, limit: float, advice: str) -> Row:
    """Return the row of two numbers or tensors, which may differ by `limit` at most."""
    return Row(
        subject=subject,
        compared=compared,
        apart=f"{difference:.1e} (at most {limit:.0e})",
        advice="" if difference <= limit else advice,  # False for NaN
    )


class DoubleStays(TorchFunctionMode):
    """Makes x.float() and dtype=torch.float32 keep fp64: plugins mean "at least fp32" by them, and
    in an fp64 check the rounding would look like an error."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64:
            if func is torch.Tensor.float:
                return args[0]
            if func is torch.Tensor.to:
                args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
            if kwargs and kwargs.get("dtype") is torch.float32:
                kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **(kwargs or {}))
