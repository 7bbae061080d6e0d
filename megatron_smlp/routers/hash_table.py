"""Tables of HASH: token id -> expert (Roller et al. 2021, arXiv 2106.04426).

    random      uniform numbers in [0, E), by a seed
    balanced    the most frequent token first, each to the expert with the fewest tokens so far

Ties in load are broken by the number of ids, then by the expert's number, so that tokens which the
corpus lacks are spread evenly too. Letters: V vocabulary without padding, E experts.
"""

from __future__ import annotations

import heapq

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def random_table(*, num_experts: int, vocab_size: int, seed: int) -> Tensor:
    """Draw <int64>[V] of numbers in [0, E)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(num_experts, (vocab_size,), generator=generator)


def balanced_table(counts: NDArray[np.int64], *, num_experts: int) -> NDArray[np.int64]:
    """Map counts: <int64>[V], how often the corpus holds each id, to experts: <int64>[V]."""
    table = np.empty(len(counts), dtype=np.int64)
    experts = [(0, 0, expert) for expert in range(num_experts)]
    for token in np.argsort(-counts, kind="stable").tolist():
        load, num_ids, expert = experts[0]
        table[token] = expert
        heapq.heapreplace(experts, (load + int(counts[token]), num_ids + 1, expert))
    return table
