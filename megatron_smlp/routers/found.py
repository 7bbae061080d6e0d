"""The modules of a kind within models, looked up once: a walk over the modules of thousands of
experts takes longer than their launches, and several parts of a step need one."""

from __future__ import annotations

from collections.abc import Iterable
from weakref import WeakKeyDictionary

from torch import nn

_FOUND: WeakKeyDictionary[nn.Module, dict[type, list[nn.Module]]] = WeakKeyDictionary()


def found[M: nn.Module](models: Iterable[nn.Module], kind: type[M]) -> list[M]:
    """Return the modules of this class, in their order. A model's modules must not change."""
    result: list[M] = []
    for model in models:
        known = _FOUND.setdefault(model, {})
        if kind not in known:
            known[kind] = [module for module in model.modules() if isinstance(module, kind)]
        result += known[kind]
    return result
