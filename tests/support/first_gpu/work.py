"""Estimate how long the cases take on one GPU, by count: what each does, times what that takes.

Nothing here was timed on a GPU. SECONDS are estimates, which show what a growing list of cases
costs; a report gives the time that a run took next to the estimate.
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
    """Steps of small models, each saved or logged."""
    kernels: int = 0
    """Kernels compiled."""
    reference_steps: int = 0
    """Steps on the CPU, in bf16 or fp32."""
    large_steps: int = 0
    """Steps of configs/paper/regular."""
    tools: int = 0
    """Runs of programs of tools/."""
    processes: int = 1
    """Processes that start CUDA."""


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
"""Seconds to import torch and Megatron, once."""


def seconds(works: Iterable[Work]) -> float:
    """Return the seconds that these take, one after another."""
    return IMPORTS + sum(
        count * each for work in works for count, each in zip(work, SECONDS, strict=True)
    )
