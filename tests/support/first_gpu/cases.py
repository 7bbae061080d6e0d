"""The cases of `make first-gpu`, a machine's first day; each runs in a process of its own.

Torch is imported inside them: a conversion hides GPUs before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from support.first_gpu import real_size
from support.first_gpu import tool_cases as tools
from support.first_gpu.device_cases import environment, kernel_times, operators
from support.first_gpu.kernel_cases import kernels
from support.first_gpu.model_cases import (
    FLAGS_OF_LAYOUTS,
    async_save,
    dropout,
    fp16,
    layout,
    recompute,
    trains,
    transformer_engine,
)
from support.first_gpu.notes import Notes, Place
from support.first_gpu.reference import LAYOUTS, reference
from support.first_gpu.training import SPARSE
from support.systems import SYSTEMS


@dataclass(frozen=True)
class Case:
    """A name, what runs, and the cases whose files it reads."""

    name: str
    run: Callable[[Place, Notes], None]
    needs: tuple[str, ...] = ()
    limit: int = 120
    """Seconds on a GPU; the process is ended after that."""
    is_reference: bool = False
    """Whether the CPU runs it, and nothing is broken in it."""


def _all() -> dict[str, Case]:
    cases = [Case("environment", environment)]
    references = {name: f"reference_{name}" for name in (*SYSTEMS, LAYOUTS)}
    cases += [
        Case(case, partial(reference, name=name), is_reference=True)
        for name, case in references.items()
    ]
    cases += [
        Case(f"train_{name}", partial(trains, system=name), needs=(references[name],))
        for name in SYSTEMS
    ]
    cases += [Case(f.__name__, f) for f in (operators, kernel_times, recompute, dropout)]
    cases += [Case("kernels", kernels, limit=300)]
    cases += [
        Case(f"size_{name}", partial(real_size.real_size, system=name), limit=180)
        for name in real_size.SYSTEMS
    ]
    cases += [Case(f.__name__, f, needs=(references[SPARSE],)) for f in (async_save, fp16)]
    cases += [Case("transformer_engine", transformer_engine, limit=300), Case("text", tools.text)]
    on_checkpoint = (tools.evaluate, tools.generate, tools.convert)
    cases += [Case(f.__name__, f, needs=("text",)) for f in on_checkpoint]
    cases += [Case(f.__name__, f, needs=("convert",)) for f in (tools.exported, tools.serve)]
    cases += [
        Case(name, partial(layout, name=name), needs=(references[LAYOUTS],), limit=180)
        for name in FLAGS_OF_LAYOUTS
    ]
    return {case.name: case for case in cases}


CASES = _all()
