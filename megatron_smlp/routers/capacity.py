"""Capacity: an expert serves a limited number of choices, the others pass by the residual.

Letters: N tokens of the routing group, E experts, k choices of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor


def within_capacity(
    wanted: Tensor, asking: Tensor, priority: Tensor, *, capacity: int, num_experts: int
) -> Tensor:
    """Choose which choices get a slot of their expert. First choices come before second ones.

    wanted: <int64>[N, k]; asking: <bool>[N, k], which of them take part; priority: <float>[N, k],
    the largest comes first and ties go by position: constant for drop policy `position`, the
    router's probabilities for `probs`.
    Returns <bool>[N, k].
    """
    order = priority.T.argsort(dim=1, descending=True, stable=True)
    rank_start = len(wanted) * torch.arange(wanted.shape[1], device=wanted.device)
    order = (order + rank_start[:, None]).flatten()
    asked = torch.where(asking, wanted, num_experts).T.flatten()[order]
    # Sorted by expert, and within it by rank: N k numbers, where a table of all experts is E times.
    experts, queue = asked.sort(stable=True)
    place = torch.arange(len(queue), device=queue.device) - torch.searchsorted(experts, experts)
    kept = torch.empty_like(order, dtype=torch.bool)
    kept[order[queue]] = place < capacity
    return kept.unflatten(0, (wanted.shape[1], -1)).T & asking
