"""Deterministic feature routing: chunk i of the features goes to expert i mod E, with weight 1.

    e(i) = i mod E        s_i = 1

Yu et al., arXiv 2203.06850, section 3, where C = E. Nothing is learned and no token is looked at,
so it is causal, and where tp divides E it needs no communication: the layer is spatial gating whose
heads are the experts (layers/feature_moe.py). Partial prediction (prefix.py) has it for the rows
that must not see all of the prefix.
"""

from __future__ import annotations

import torch
from torch import Tensor


def experts_of_chunks(first: int, count: int, *, num_experts: int, device: torch.device) -> Tensor:
    """Return the experts of the chunks `first` to `first + count - 1`: <int64>[count]."""
    return (first + torch.arange(count, device=device)) % num_experts
