"""Capacity: an expert serves a limited number of choices, the others pass by the residual.

Letters: N tokens of the routing group, E experts, k choices of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


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
    choices = functional.one_hot(wanted.T.flatten(), num_experts) * asking.T.flatten()[:, None]
    place = choices[order].cumsum(dim=0).gather(1, wanted.T.flatten()[order, None])[:, 0]
    kept = torch.empty_like(order, dtype=torch.bool)
    kept[order] = place <= capacity
    return kept.unflatten(0, (wanted.shape[1], -1)).T & asking
