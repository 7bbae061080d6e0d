"""The cases of `make first-gpu`, a machine's first day; each runs in a process of its own.

Torch is imported inside them: a conversion hides GPUs before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from support.first_gpu import tool_cases as tools
from support.first_gpu.device_cases import environment, kernel_times, operators
from support.first_gpu.model_cases import (
    LAYOUTS,
    async_save,
    cpu_losses,
    dropout,
    fp16,
    layout,
    one_process,
    recompute,
    trains,
    transformer_engine,
)
from support.first_gpu.notes import Notes, Place
from support.systems import SYSTEMS


@dataclass(frozen=True)
class Case:
    """A name, what runs, and the cases whose files it reads."""

    name: str
    run: Callable[[Place, Notes], None]
    needs: tuple[str, ...] = ()
    limit: int = 120
    """Seconds on a GPU; the process is ended after that."""


def _all() -> dict[str, Case]:
    cases = [Case("environment", environment), Case("cpu_losses", cpu_losses, limit=240)]
    cases += [Case(f"train_{name}", partial(trains, system=name)) for name in SYSTEMS]
    cases += [
        Case(f.__name__, f) for f in (operators, kernel_times, recompute, dropout, async_save, fp16)
    ]
    cases += [Case("transformer_engine", transformer_engine, limit=300), Case("text", tools.text)]
    on_checkpoint = (tools.evaluate, tools.generate, tools.convert)
    cases += [Case(f.__name__, f, needs=("text",)) for f in on_checkpoint]
    cases += [Case(f.__name__, f, needs=("convert",)) for f in (tools.exported, tools.serve)]
    cases += [Case("one_process", one_process)]
    cases += [
        Case(name, partial(layout, name=name), needs=("one_process",), limit=180)
        for name in LAYOUTS
    ]
    return {case.name: case for case in cases}


CASES = _all()
