"""The modules of a kind within models, looked up once: a walk over the modules of thousands of
experts takes longer than their launches, and several parts of a step need one."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def found[M: nn.Module](models: Iterable[nn.Module], kind: type[M]) -> list[M]:
    """Return the modules of this class, in their order. A model's modules must not change.

    Each model keeps its own: a table of weak references to models would keep them alive, since
    DDP's hooks on the parameters of the modules in it refer to the model.
    """
    result: list[M] = []
    for model in models:
        known = vars(model).setdefault("_found", {})
        if kind not in known:
            known[kind] = [module for module in model.modules() if isinstance(module, kind)]
        result += known[kind]
    return result
