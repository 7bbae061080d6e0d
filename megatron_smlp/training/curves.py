"""Numbers for TensorBoard and W&B beside Megatron's own curves.

Megatron opens both writers on the last rank; every rank knows the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer


def run_curves(numbers: Mapping[str, Any]) -> dict[str, float]:
    """Return what Megatron's own curves lack, of a line of metrics.jsonl."""
    names = ("tokens_per_second", "tflops_per_device", "mfu", "consumed_tokens")
    return {f"run/{name}": numbers[name] for name in names if numbers[name] is not None}


def to_writers(values: Mapping[str, float], *, iteration: int) -> None:
    """Write the numbers to TensorBoard and W&B, on the rank that has them."""
    tensorboard, wandb = get_tensorboard_writer(), get_wandb_writer()
    if tensorboard:
        for name, value in values.items():
            tensorboard.add_scalar(name, value, iteration)
    if wandb and values:
        wandb.log(values, iteration)
