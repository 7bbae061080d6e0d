"""Token routers on examples small enough to compute by hand: choices, weights, drops, losses."""

import math

import pytest
import torch
from support.smlp_systems import make_config, make_model
from torch import Tensor

from megatron_smlp.hf.modeling_smlp import SMLPGShardRouter, balanced_greedy


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
