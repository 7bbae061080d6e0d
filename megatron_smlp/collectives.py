"""Broadcasts and all-gathers of small Python objects. Collective."""

from __future__ import annotations

from typing import Any

import torch


def from_first_rank(value: Any) -> Any:
    """Return rank 0's value on every rank."""
    return from_rank(value, 0)


def from_rank(value: Any, rank: int) -> Any:
    """Return the given rank's value on every rank."""
    box = [value]
    torch.distributed.broadcast_object_list(box, src=rank)
    return box[0]


def gathered(value: Any) -> list[Any]:
    """Return the values of all ranks on every rank."""
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
