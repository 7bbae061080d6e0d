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
from support.first_gpu.work import Work, seconds
from support.systems import SYSTEMS

NO_TRAINING = Work()


@dataclass(frozen=True)
class Case:
    """A name, what runs, and the cases whose files it reads."""

    name: str
    run: Callable[[Place, Notes], None]
    needs: tuple[str, ...] = ()
    work: Work = NO_TRAINING
    """What it does on a GPU."""
    limit: int = 120
    """Seconds on a GPU, after which the process is killed."""
    is_reference: bool = False
    """Whether it runs on the CPU, free of sabotage."""
    gpus: int = 1


RESUMED = Work(trainings=2, steps=5)
"""Three steps, and two of them again."""
KERNELS = {"gmlp": 6, "amlp": 6, "base": 12, "smlp_partial": 6}
"""System -> number of kernels that no earlier case has compiled."""


def _all() -> dict[str, Case]:
    names = {name: f"reference_{name}" for name in (*SYSTEMS, *STARTS)}
    cases = [Case("environment", environment), *_references(names)]
    cases += [
        Case(
            f"train_{name}",
            partial(trains, system=name),
            needs=(names[name],),
            work=RESUMED._replace(kernels=KERNELS.get(name, 0)),
        )
        for name in SYSTEMS
    ]
    cases += [Case(operators.__name__, operators, work=Work(kernels=6))]
    cases += [Case(kernel_times.__name__, kernel_times, work=Work(kernels=22, large_steps=5))]
    cases += [Case(recompute.__name__, recompute, work=Work(trainings=6, steps=18))]
    cases += [Case(dropout.__name__, dropout, work=RESUMED)]
    cases += [Case("kernels", kernels, work=Work(kernels=192), limit=300)]
    cases += [
        Case(
            f"size_{name}",
            partial(real_size.real_size, system=name),
            work=Work(trainings=1, large_steps=real_size.NUM_STEPS, kernels=40),
            limit=180,
        )
        for name in real_size.SYSTEMS
    ]
    sparse, graphed = (names[SPARSE],), tuple(names[name] for name in GRAPHED)
    cases += [Case(async_save.__name__, async_save, sparse, RESUMED)]
    cases += [Case(fp16.__name__, fp16, sparse, Work(trainings=1, steps=3, kernels=6))]
    cases += [Case(cuda_graphs.__name__, cuda_graphs, graphed, Work(trainings=2, steps=6))]
    runs = len(SYSTEMS) + 1
    with_te = Work(trainings=runs, steps=3 * runs)
    systems = tuple(names[name] for name in SYSTEMS)
    cases += [Case(transformer_engine.__name__, transformer_engine, systems, with_te, limit=300)]
    return {case.name: case for case in [*cases, *_of_tools(), *_of_layouts(names)]}


def _references(names: dict[str, str]) -> list[Case]:
    """Return cases for systems and for what multi-GPU layouts start from, which train once more."""
    least = {name: min(x.ranks for x in LAYOUTS.values() if x.start == name) for name in STARTS}
    return [
        Case(
            case,
            partial(reference, name=name),
            work=Work(
                trainings=2 + (name in STARTS),
                reference_steps=6 + (name in STARTS),
                processes=0,
            ),
            limit=180 if name in STARTS else 120,
            is_reference=True,
            gpus=least.get(name, 1),
        )
        for name, case in names.items()
    ]


def _of_tools() -> list[Case]:
    after = {
        "text": (tools.evaluate, tools.generate, tools.convert),
        "convert": (tools.exported, tools.serve),
    }
    text = Case("text", tools.text, work=Work(trainings=1, steps=3))
    return [text] + [
        Case(f.__name__, f, (before,), Work(tools=1))
        for before, several in after.items()
        for f in several
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


def estimate() -> float:
    """Estimate the seconds on a machine with one GPU, by count."""
    return seconds(case.work for case in CASES.values() if case.gpus == 1)
