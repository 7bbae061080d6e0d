"""What a conversion is made of: tensors to read, recipes for tensors to write, and their accounts.

A recipe says from which tensors one new tensor is made, and how. It is run twice: on the `meta`
device, which gives the new tensor's shape and dtype without reading anything, so that a conversion
is checked as a whole before its first byte is written; and on the real tensors, one recipe at a
time, so that memory holds what one tensor needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_smlp.errors import UsageError


@dataclass(frozen=True)
class Spec:
    """A tensor without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Spec:
        return cls(tuple(tensor.shape), tensor.dtype)

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def on_meta(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


def main_dtype(specs: Mapping[str, Spec]) -> torch.dtype:
    """What most floating-point tensors are kept in."""
    floats = [spec.dtype for spec in specs.values() if spec.dtype.is_floating_point]
    return max(set(floats), key=floats.count)


class Source(Protocol):
    """Where tensors are read from, one at a time."""

    @property
    def specs(self) -> Mapping[str, Spec]: ...

    def read(self, name: str, row: int | None = None) -> Tensor:
        """A tensor in memory of its own, or one of its rows: `[E, X, D]` -> `[X, D]`."""
        ...

    def read_into(self, target: Tensor, name: str, *, start: int = 0) -> None:
        """Fill a tensor with rows of the one of this name, from `start` on."""
        ...


@dataclass(frozen=True)
class Recipe:
    """One new tensor from some old ones; from none where its values are new."""

    sources: tuple[str, ...]
    make: Callable[..., Tensor]
    """Called with the sources' tensors, on the meta device too."""


Plan = Mapping[str, Recipe]
"""New tensor's name -> its recipe."""


def same(tensor: Tensor) -> Tensor:
    """The recipe of a tensor that only gets another name."""
    return tensor


def account(
    plan: Plan,
    source: Mapping[str, Spec],
    expected: Mapping[str, tuple[int, ...]],
    *,
    where: str,
    allowed_to_drop: Iterable[str] = (),
) -> dict[str, Spec]:
    """Check that a plan uses every source tensor and makes every expected one, in its shape.

    Args:
        source: what there is to read.
        expected: names and shapes that the target model has.
        where: what the source is, for messages.
        allowed_to_drop: source tensors that need not be used.

    Returns:
        names, shapes and dtypes of the new tensors, in the plan's order.

    Raises:
        UsageError: with the name of a tensor that is missing, unknown or of another shape.
    """
    for target, recipe in plan.items():
        for name in recipe.sources:
            if name not in source:
                raise UsageError(f"{where} lacks the tensor {name}, which {target} is made of.")
        if target not in expected:
            named = ", ".join(recipe.sources)
            raise UsageError(f"{where} holds {named}, which has no place in this model ({target}).")
    missing = [name for name in expected if name not in plan]
    if missing:
        raise UsageError(f"{where} lacks what {_some(missing)} could be made of.")
    used = {name for recipe in plan.values() for name in recipe.sources}
    unknown = sorted(set(source) - used - set(allowed_to_drop))
    if unknown:
        raise UsageError(f"{where} holds {_some(unknown)}, which this model does not know.")
    specs = {target: _outcome(target, recipe, source, where) for target, recipe in plan.items()}
    for target, spec in specs.items():
        if spec.shape != expected[target]:
            named = ", ".join(f"{n} {list(source[n].shape)}" for n in plan[target].sources)
            raise UsageError(
                f"{where} holds {named}, which makes {target} {list(spec.shape)}; this model's "
                f"is {list(expected[target])}."
            )
    return specs


def check_scale(specs: Mapping[str, Spec], flags: Mapping[str, Any], *, where: str) -> None:
    """Refuse sizes that the tensors plainly do not have: a model of them would take hours to build.

    Raises:
        UsageError: there is not a tensor for each layer, or not a row for each expert.
    """
    num_layers, num_experts = flags.get("num_layers"), flags.get("num_experts")
    if not isinstance(num_layers, int) or num_layers > len(specs):
        raise UsageError(
            f"{where} holds {len(specs)} tensors, which is no model of {num_layers} layers."
        )
    most = max((spec.shape[0] for spec in specs.values() if spec.shape), default=0)
    if not isinstance(num_experts, int | None) or (num_experts or 0) > most:
        raise UsageError(f"{where} holds no tensor with rows for {num_experts} experts.")


def _outcome(target: str, recipe: Recipe, source: Mapping[str, Spec], where: str) -> Spec:
    try:
        with torch.device("meta"):  # for recipes that make new values
            return Spec.of(recipe.make(*(source[name].on_meta() for name in recipe.sources)))
    except RuntimeError as error:  # what torch says of shapes that do not fit
        named = ", ".join(f"{n} {list(source[n].shape)}" for n in recipe.sources)
        raise UsageError(
            f"{where} holds {named}, of which {target} cannot be made: {error}"
        ) from error


def _some(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


class Converted:
    """The new tensors of a plan, made when they are read.

    Args:
        expected: names and shapes that they have to have.
        where: what the source is, for messages.

    Raises:
        UsageError: a tensor is missing, unknown or of another shape.
    """

    def __init__(
        self, plan: Plan, source: Source, expected: Mapping[str, tuple[int, ...]], *, where: str
    ) -> None:
        self.plan, self.source = plan, source
        self.specs = account(plan, source.specs, expected, where=where)

    def read(self, name: str, row: int | None = None) -> Tensor:
        recipe = self.plan[name]
        if recipe.make is same:
            return self.source.read(recipe.sources[0], row)
        made = recipe.make(*map(self.source.read, recipe.sources))
        return made if row is None else made[row]

    def read_into(self, target: Tensor, name: str, *, start: int = 0) -> None:
        target.copy_(self.read(name)[start : start + len(target)])


def tensors_of(source: Source) -> Iterator[tuple[str, Tensor]]:
    """One at a time, in the order of their names in the source."""
    for name in source.specs:
        yield name, source.read(name)
