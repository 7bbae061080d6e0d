"""HASH's tables: their balance, the file, and which table a model starts with."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_smlp.routers.hash_table import balanced_table, read_table, table_as_json


def test_by_hand():
    """9 goes to the first, 5 and 4 to the others, 3 to the one with 4, 2 to the one with 5."""
    table = balanced_table(np.array([2, 9, 3, 5, 4]), num_experts=3)
    assert table.tolist() == [1, 0, 2, 1, 2]


def test_tokens_that_the_corpus_lacks_are_spread_evenly():
    table = balanced_table(np.zeros(4096, dtype=np.int64), num_experts=8)
    assert set(np.bincount(table).tolist()) == {4096 // 8}


def test_the_file_is_read_back(tmp_path: Path):
    table = balanced_table(np.arange(99), num_experts=4)
    path = tmp_path / "table.json"
    path.write_text(table_as_json(table, num_experts=4))
    read = read_table(path, num_experts=4, vocab_size=99)
    assert read.dtype == torch.int64
    assert read.tolist() == table.tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": [0, 1, 2]}, "is for a vocabulary of 3 ids, but the tokenizer has 4"),
        ({"experts": [0, 1, 2, 0]}, r"names experts outside 0\.\.1"),
        ({"experts": [0, -1, 1, 0]}, r"names experts outside 0\.\.1"),
        ({"num_experts": 3}, "is for 3 experts, not for --num-experts 2"),
        ({"experts": "many"}, "is not a hash table"),
        ({"experts": None}, "is not a hash table"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path: Path, changes: dict, message: str):
    body = json.loads(table_as_json(np.array([0, 1, 1, 0]), num_experts=2))
    path = tmp_path / "table.json"
    path.write_text(json.dumps(body | changes))
    with pytest.raises(ValueError, match=message):
        read_table(path, num_experts=2, vocab_size=4)


@pytest.mark.usefixtures("megatron")
class TestRouter:
    """The table of a new model, padded ids included."""

    def build(self, **changes: object) -> torch.Tensor:
        from megatron.core.process_groups_config import ProcessGroupCollection
        from support.in_process import layer_config

        from megatron_smlp.routers.hash import HashRouter

        config = layer_config(
            token_router="hash",
            num_moe_experts=2,
            moe_router_topk=1,
            moe_router_pre_softmax=True,
            add_bias_linear=False,
            hash_vocab_size=8,
            **changes,
        )
        return HashRouter(config, ProcessGroupCollection.use_mpu_process_groups()).table

    def test_a_table_file_wins_over_the_seed(self, tmp_path: Path):
        path = tmp_path / "table.json"
        path.write_text(table_as_json(np.array([1, 0, 0, 1, 1]), num_experts=2))
        table = self.build(hash_table=str(path), tokenizer_vocab_size=5)
        assert table[:5].tolist() == [1, 0, 0, 1, 1]
        assert len(table) == 8

    def test_seeds_differ(self):
        first, same, other = (self.build(hash_seed=seed) for seed in (1, 1, 4))
        assert torch.equal(first, same)
        assert not torch.equal(first, other)
