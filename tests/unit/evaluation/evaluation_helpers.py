"""Small systems to evaluate, and Megatron's model of a checkpoint in the test's own process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

TEXT = "the model mixes every token with what came before it and nothing that comes after, twice"
LENGTH = 24
EXAMPLES = 24
"""Of each task in the fixture `tasks`."""

SIZES = f"--seq-length {LENGTH} --max-position-embeddings {LENGTH} --num-layers 2"
SYSTEMS = {
    "partial": (
        f"{SIZES} --architecture smlp --num-dense-layers 1 --feature-router partial "
        "--num-feature-experts 2 --num-experts 4 --token-router base"
    ),
    "gshard": (
        f"{SIZES} --architecture transformer --num-attention-heads 4 --num-experts 4 "
        "--token-router gshard --moe-eval-capacity-factor 1"
    ),
}


@dataclass(frozen=True)
class Run:
    """One system, in both formats."""

    checkpoint: Path
    exported: Path


@contextlib.contextmanager
def loaded(checkpoint: Path, *flags: str) -> Iterator[tuple[Any, list[Any], Any]]:
    """What `load_model` returns; Megatron forgets it afterwards."""
    from support.runs import forget_run

    from megatron_smlp.evaluation.megatron_loading import load_model

    try:
        yield load_model(str(checkpoint), flags)
    finally:
        forget_run()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
