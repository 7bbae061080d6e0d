"""The cases of `make first-gpu`, a machine's first day; each runs in a process of its own.

They import torch themselves: a conversion hides the GPUs first.
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
    GRAPHED,
    LAYOUTS,
    async_save,
    cuda_graphs,
    dropout,
    fp16,
    layout,
    recompute,
    trains,
    transformer_engine,
)
from support.first_gpu.notes import Notes, Place
from support.first_gpu.reference import reference
from support.first_gpu.training import SPARSE, STARTS
from support.systems import SYSTEMS


@dataclass(frozen=True)
class Case:
    """A name, what runs, and the cases whose files it reads."""

    name: str
    run: Callable[[Place, Notes], None]
    needs: tuple[str, ...] = ()
    limit: int = 120
    """Seconds on a GPU, after which the process is killed."""
    is_reference: bool = False
    """Whether it runs on the CPU, free of sabotage."""
    gpus: int = 1


def _all() -> dict[str, Case]:
    names = {name: f"reference_{name}" for name in (*SYSTEMS, *STARTS)}
    sparse, graphed = (names[SPARSE],), tuple(names[name] for name in GRAPHED)
    systems = tuple(names[name] for name in SYSTEMS)
    cases = [
        Case("environment", environment),
        *_references(names),
        *(Case(f"train_{name}", partial(trains, system=name), (names[name],)) for name in SYSTEMS),
        Case("operators", operators),
        Case("kernel_times", kernel_times),
        Case("recompute", recompute),
        Case("dropout", dropout),
        Case("kernels", kernels, limit=600),
        *(
            Case(f"size_{name}", partial(real_size.real_size, system=name), limit=180)
            for name in real_size.SYSTEMS
        ),
        Case("async_save", async_save, sparse),
        Case("fp16", fp16, sparse),
        Case("cuda_graphs", cuda_graphs, graphed),
        Case("transformer_engine", transformer_engine, systems, limit=300),
        Case("text", tools.text),
        *(Case(f.__name__, f, ("text",)) for f in (tools.evaluate, tools.generate, tools.convert)),
        *(Case(f.__name__, f, ("convert",)) for f in (tools.exported, tools.serve)),
        *_of_layouts(names),
    ]
    return {case.name: case for case in cases}


def _references(names: dict[str, str]) -> list[Case]:
    """Return cases for systems and for what multi-GPU layouts start from, which train once more."""
    least = {name: min(x.ranks for x in LAYOUTS.values() if x.start == name) for name in STARTS}
    return [
        Case(
            case,
            partial(reference, name=name),
            limit=180 if name in STARTS else 120,
            is_reference=True,
            gpus=least.get(name, 1),
        )
        for name, case in names.items()
    ]


def _of_layouts(names: dict[str, str]) -> list[Case]:
    return [
        Case(
            name,
            partial(layout, name=name),
            needs=(names[asked.start],),
            limit=180,
            gpus=asked.ranks,
        )
        for name, asked in LAYOUTS.items()
    ]


CASES = _all()
