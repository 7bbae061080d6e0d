"""HASH's tables: their balance, and the initial table of a model."""

import numpy as np
import pytest
import torch
from support.routers import make_router

from megatron_smlp.routers.hash_table import balanced_table


def test_by_hand():
    """9 goes to the first, 5 and 4 to the others, 3 to the one with 4, 2 to the one with 5."""
    table = balanced_table(np.array([2, 9, 3, 5, 4]), num_experts=3)
    assert table.tolist() == [1, 0, 2, 1, 2]


def test_tokens_that_the_corpus_lacks_are_spread_evenly():
    table = balanced_table(np.zeros(4096, dtype=np.int64), num_experts=8)
    assert set(np.bincount(table).tolist()) == {4096 // 8}


@pytest.mark.usefixtures("megatron")
class TestRouter:
    """The table of a new model, padded ids included."""

    def test_seeds_differ(self):
        first, same, other = (
            make_router("hash", num_experts=2, hash_seed=seed).table for seed in (1, 1, 4)
        )
        assert torch.equal(first, same)
        assert not torch.equal(first, other)
