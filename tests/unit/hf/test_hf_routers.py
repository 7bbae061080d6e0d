"""Token routers on examples small enough to compute by hand: choices, weights, drops, losses."""

import math

import pytest
import torch
from support.smlp_systems import make_config, make_model
from torch import Tensor

from megatron_smlp.hf.modeling_smlp import (
    SMLPBaseRouter,
    SMLPGShardRouter,
    SMLPHashRouter,
    SMLPSwitchRouter,
    balanced_greedy,
)


def _probable(probabilities: list[list[float]]) -> Tensor:
    """Tokens whose logits, through an identity router weight, give these probabilities."""
    return torch.tensor(probabilities).log()


def _router(kind, token_router: str, num_experts: int, **changes):
    """With W = 1, so that a token of D = E numbers is its own logits."""
    config = make_config(token_router, hidden_size=num_experts, num_experts=num_experts, **changes)
    router = kind(config)
    if hasattr(router, "weight"):
        router.weight.data.copy_(torch.eye(num_experts))
    return router


SIX = [[0.7, 0.3], [0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.8, 0.2], [0.4, 0.6]]
"""Four tokens want expert 0 (0, 1, 2, 4), two want expert 1."""


def _switch(**changes) -> SMLPSwitchRouter:
    return _router(SMLPSwitchRouter, "switch", 2, num_attention_heads=1, **changes)


@pytest.mark.parametrize(
    ("training", "factor", "num_kept"),
    [(True, 0.5, 4), (True, None, 6), (False, 0.5, 6), (False, 2.0, 6), (False, 0.4, 6)],
)
def test_switch_has_one_capacity_for_training_and_one_for_evaluation(training, factor, num_kept):
    router = _switch(moe_train_capacity_factor=factor, moe_eval_capacity_factor=None)
    router.train(training)
    routing = router(_probable(SIX), None, limited=True)
    assert int((routing.experts >= 0).sum()) == num_kept
    assert (routing.loss is not None) == training


def _gshard(**changes) -> SMLPGShardRouter:
    return _router(SMLPGShardRouter, "gshard", 3, num_attention_heads=1, **changes)


@pytest.mark.parametrize("rule", ["paper", "all", "raw"])
def test_how_often_gshard_uses_the_second_expert(rule: str):
    router = _gshard(moe_train_capacity_factor=None, gshard_second_expert=rule)
    for second in (0.05, 0.2, 0.45):
        tokens = _probable([[0.9 - second, second, 0.1]] if second > 0.1 else [[0.94, 0.05, 0.01]])
        routing = router(tokens.expand(20_000, -1), None, limited=True)
        used = (routing.experts[:, 1] >= 0).float().mean().item()
        gates = tokens[0].softmax(-1)
        raw = 2 * gates[1].item()
        paper = raw / (gates[0] + gates[1]).item()
        expected = min(1.0, {"paper": paper, "all": 1.0, "raw": raw}[rule])
        assert abs(used - expected) < 5 * math.sqrt(0.25 / 20_000)
        assert (routing.experts[:, 0] == 0).all()


def test_base_is_balanced_in_training_and_greedy_in_evaluation():
    router = _router(SMLPBaseRouter, "base", 4)
    tokens = torch.randn(22, 4) + torch.tensor([3.0, 0.0, 0.0, 0.0])
    counts = router(tokens, None, limited=True).experts[:, 0].bincount(minlength=4)
    assert sorted(counts.tolist()) == [5, 5, 6, 6]
    greedy = router.eval()(tokens, None, limited=True)
    assert torch.equal(greedy.experts[:, 0], tokens.argmax(1))
    torch.testing.assert_close(greedy.weights[:, 0], tokens.max(1).values.sigmoid())
    assert greedy.loss is None


def test_priced_gates_of_base():
    """The weight is of the lead at the prices, and a shift of an expert's scores is nothing."""
    router = _router(SMLPBaseRouter, "base", 4, base_gate="price")
    tokens = torch.randn(64, 4)
    shifted = (tokens + torch.tensor([5.0, -3.0, 0.0, 9.0])).requires_grad_()
    routing, same = router(tokens, None, limited=True), router(shifted, None, limited=True)
    assert torch.equal(same.experts, routing.experts)
    torch.testing.assert_close(same.weights, routing.weights, rtol=0, atol=0.02)
    same.weights.sum().backward()
    torch.testing.assert_close(shifted.grad.sum(0), torch.zeros(4), rtol=0, atol=1e-5)
    router.eval().prices.copy_(torch.tensor([0.5, 0.0, -0.5, 9.0]))
    one = router(torch.tensor([[1.0, 0.7, 0.1, 2.0]]), None, limited=True)
    assert one.experts.tolist() == [[1]]
    torch.testing.assert_close(one.weights, torch.tensor([[0.7 + 1.3]]).sigmoid())


@pytest.mark.parametrize(("tokens", "experts"), [(0, 3), (2, 5), (64, 4), (65, 4), (7, 1)])
def test_balanced_greedy_is_balanced(tokens: int, experts: int):
    for scores in (torch.randn(tokens, experts), torch.zeros(tokens, experts)):
        counts = balanced_greedy(scores).bincount(minlength=experts)
        assert counts.sum() == tokens
        assert counts.min() >= tokens // experts
        assert counts.max() <= -(-tokens // experts)


def test_hash_follows_its_table_with_weight_one():
    router = _router(SMLPHashRouter, "hash", 4)
    router.table.copy_(torch.arange(101) % 4)
    routing = router(torch.randn(3, 4), torch.tensor([0, 7, 101 - 1]), limited=True)
    assert routing.experts[:, 0].tolist() == [0, 3, 0]
    assert (routing.weights == 1).all()
    with pytest.raises(ValueError, match="give input_ids"):
        router(torch.randn(3, 4), None, limited=True)


def test_hash_tables_of_a_new_model_come_from_the_seed():
    from megatron_smlp.hf.modeling_smlp import SMLPForCausalLM

    tables = []
    for seed in (0, 0, 1):
        model = SMLPForCausalLM(make_config("hash", hash_seed=seed))
        tables += [layer.channel.router.table for layer in model.model.layers[:1]]
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])
    assert (tables[0].bincount(minlength=4) > 0).all()


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
