"""Recipes for the tensors that a conversion writes, and a check of all that it reads and writes.

A recipe says which tensors a new tensor is made from, and how. It runs twice: first on the `meta`
device, which gives the new tensor's shape and dtype without reading anything, so that the whole
conversion is checked before its first byte is written; then on the real tensors, one recipe at a
time, so that memory holds only what one tensor needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_smlp.checkpoints.tensors import Source, Spec
from megatron_smlp.errors import UsageError


@dataclass(frozen=True)
class Recipe:
    """Makes one new tensor from some old ones, or from none if its values are new."""

    sources: tuple[str, ...]
    make: Callable[..., Tensor]
    """Called with the sources' tensors, on the meta device too."""


Plan = Mapping[str, Recipe]
"""New tensor's name -> its recipe."""


def same(tensor: Tensor) -> Tensor:
    """Return the tensor itself: the recipe of a tensor that is only renamed."""
    return tensor


def account(
    plan: Plan,
    source: Mapping[str, Spec],
    expected: Mapping[str, tuple[int, ...]],
    *,
    where: str,
) -> dict[str, Spec]:
    """Check that a plan uses every source tensor and makes every expected one, in its shape.

    Args:
        source: the tensors that can be read.
        expected: names and shapes that the target model has.
        where: what the source is, for messages.

    Returns:
        names, shapes and dtypes of the new tensors, in the plan's order.

    Raises:
        UsageError: with the name of a tensor that is missing, unknown or of another shape.
    """
    used = {name for recipe in plan.values() for name in recipe.sources}
    if missing := [*sorted(used - set(source)), *(name for name in expected if name not in plan)]:
        raise UsageError(f"{where} lacks {_some(missing)}, or their source tensors.")
    placed = {name for target in expected for name in plan[target].sources}
    if unknown := sorted(set(source) - placed):
        raise UsageError(f"{where} holds {_some(unknown)}, which this model does not have.")
    specs = {target: _outcome(target, recipe, source, where) for target, recipe in plan.items()}
    for target, spec in specs.items():
        if spec.shape != expected[target]:
            named = ", ".join(f"{n} {list(source[n].shape)}" for n in plan[target].sources)
            raise UsageError(
                f"{where} holds {named}, which makes {target} {list(spec.shape)}; this model's "
                f"is {list(expected[target])}."
            )
    return specs


def _outcome(target: str, recipe: Recipe, source: Mapping[str, Spec], where: str) -> Spec:
    try:
        with torch.device("meta"):  # for recipes that make new values
            return Spec.of(recipe.make(*(source[name].on_meta() for name in recipe.sources)))
    except RuntimeError as error:  # torch's, for shapes that do not fit
        named = ", ".join(f"{n} {list(source[n].shape)}" for n in recipe.sources)
        raise UsageError(f"{where}: {target} cannot be made from {named}: {error}") from error


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


class Converted:
    """The new tensors of a plan, each made when it is read; `account` checks them all first."""

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
