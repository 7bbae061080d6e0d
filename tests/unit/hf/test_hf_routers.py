"""What unit/routers/test_same_as_hf.py does not compare: balance, new tables, padding."""

import pytest
import torch
from support.smlp_systems import make_config, make_model

from megatron_smlp.hf.modeling_smlp import SMLPHashRouter, balanced_greedy


@pytest.mark.parametrize(("tokens", "experts"), [(0, 3), (2, 5), (64, 4), (65, 4), (7, 1)])
def test_balanced_greedy_is_balanced(tokens: int, experts: int):
    for scores in (torch.randn(tokens, experts), torch.zeros(tokens, experts)):
        counts = balanced_greedy(scores).bincount(minlength=experts)
        assert counts.sum() == tokens
        assert counts.min() >= tokens // experts
        assert counts.max() <= -(-tokens // experts)


def test_hash_tables_of_a_new_model_come_from_the_seed():
    from megatron_smlp.hf.modeling_smlp import SMLPForCausalLM

    tables = []
    for seed in (0, 0, 1):
        model = SMLPForCausalLM(make_config("hash", hash_seed=seed))
        tables += [layer.channel.router.table for layer in model.model.layers[:1]]
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])
    assert (tables[0].bincount(minlength=4) > 0).all()
    with torch.device("meta"):  # or whatever the default device is
        table = SMLPHashRouter(make_config("hash")).random_table()
    assert torch.equal(table, tables[0])


def test_padding_is_neither_routed_nor_counted():
    """Losses and balanced counts of a padded batch are those of its real tokens."""
    moe = make_model("switch").model.layers[0].channel.train()
    model = make_model("switch").model
    hidden = torch.randn(2, 6, 32)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]])
    layout, _ = model._layout(hidden, None, mask, None)
    output, loss = moe(hidden, layout, hidden)
    real = torch.cat([hidden[0], hidden[1, :2]])
    torch.testing.assert_close(loss, moe.router(real, None, limited=True).loss)
    assert (output[1, 2:] == 0).all()
