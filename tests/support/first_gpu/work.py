"""How long the cases take on one GPU, by count: what each of them does, times what that takes.

Nothing here was timed on a GPU. SECONDS are estimates, by which a list of cases that grows shows
what it costs; a report says what a run took beside what was counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

LIMIT = 600
"""Seconds on one GPU: what docs/gpus.md promises."""


class Work(NamedTuple):
    """What a case does on a GPU."""

    trainings: int = 0
    steps: int = 0
    """Of small models, each saved or logged."""
    kernels: int = 0
    """Compiled."""
    reference_steps: int = 0
    """On the CPU, in bf16 or fp32."""
    large_steps: int = 0
    """Of configs/paper/regular."""
    tools: int = 0
    """Programs of tools/."""
    processes: int = 1
    """That start CUDA."""


SECONDS = Work(
    trainings=2.5,  # Megatron, model, optimizer, data: 2 to 3 s on a core of an EPYC
    steps=0.4,  # of a few hundred launches, and a checkpoint of 10 to 50 MB
    kernels=0.5,  # benchmarks/results/kernels.json: 0.1 to 1.8 s on a core of an EPYC
    reference_steps=0.8,
    large_steps=0.6,  # 32 samples: four micro-batches of benchmarks/roofline.py's 70 ms, twice that
    tools=6,
    processes=2.0,  # a fork, CUDA's context, cuBLAS
)  # type: ignore[arg-type]
IMPORTS = 15
"""Seconds, once: torch and Megatron."""


def seconds(works: Iterable[Work]) -> float:
    """Return what these take, one after the other."""
    return IMPORTS + sum(
        count * each for work in works for count, each in zip(work, SECONDS, strict=True)
    )
