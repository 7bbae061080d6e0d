"""Token routers on examples small enough to compute by hand: choices, weights, drops, losses."""

import math

import pytest
import torch
from support.smlp_systems import make_config, make_ids, make_model
from torch import Tensor
from torch.nn import functional

from megatron_smlp.hf.modeling_smlp import (
    SMLPBaseRouter,
    SMLPGShardRouter,
    SMLPHashRouter,
    SMLPSwitchRouter,
    SMLPTokenMoE,
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
TWO = {"num_attention_heads": 1, "hidden_size": 2}


def _switch(**changes) -> SMLPSwitchRouter:
    return _router(SMLPSwitchRouter, "switch", 2, num_attention_heads=1, **changes)


def test_switch_weights_choices_and_loss():
    router = _switch(moe_train_capacity_factor=None, moe_aux_loss_coeff=0.01)
    routing = router(_probable(SIX), None, limited=True)
    assert routing.experts.tolist() == [[0], [0], [0], [1], [0], [1]]
    expected = torch.tensor([0.7, 0.9, 0.6, 0.8, 0.8, 0.6])
    torch.testing.assert_close(routing.weights[:, 0], expected)
    # f = (4/6, 2/6); P = (3.6/6, 2.4/6); loss = 0.01 * 2 * sum f P
    torch.testing.assert_close(routing.loss.item(), 0.02 * (4 / 6 * 0.6 + 2 / 6 * 0.4))


@pytest.mark.parametrize(
    ("policy", "kept"), [("position", [0, 1, 2, 3, 5]), ("probs", [0, 1, 3, 4, 5])]
)
def test_switch_drops_by_position_or_by_probability(policy: str, kept: list[int]):
    """Capacity ceil(1 * 6 / 2) = 3: one of the four tokens of expert 0 must go."""
    router = _switch(moe_train_capacity_factor=1.0, moe_drop_policy=policy)
    routing = router(_probable(SIX), None, limited=True)
    assert (routing.experts[:, 0] >= 0).nonzero()[:, 0].tolist() == kept
    whole = router(_probable(SIX), None, limited=False)
    assert routing.loss == whole.loss, "shares are counted before dropping"


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


def test_switch_evaluation_capacity():
    router = _switch(moe_train_capacity_factor=None, moe_eval_capacity_factor=0.5).eval()
    assert int((router(_probable(SIX), None, limited=True).experts >= 0).sum()) == 4
    assert int((router(_probable(SIX), None, limited=False).experts >= 0).sum()) == 6


def _gshard(**changes) -> SMLPGShardRouter:
    return _router(SMLPGShardRouter, "gshard", 3, num_attention_heads=1, **changes)


def test_gshard_weights_and_choices_in_evaluation():
    routing = _gshard().eval()(_probable([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6]]), None, limited=True)
    assert routing.experts.tolist()[0] == [0, 1]
    torch.testing.assert_close(routing.weights[0], torch.tensor([2 / 3, 1 / 3]))
    torch.testing.assert_close(routing.weights[1], torch.tensor([0.75, 0.25]))
    assert routing.loss is None


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


def test_gshard_first_choices_take_slots_before_second_ones():
    """Five tokens, three experts, c = 0.5: 2 * 0.5 * ceil(5 / 3) = 2 slots each."""
    rows = [[0.5, 0.49, 0.01], [0.5, 0.49, 0.01], [0.01, 0.5, 0.49], [0.01, 0.5, 0.49]]
    rows.append([0.49, 0.01, 0.5])
    router = _gshard(moe_eval_capacity_factor=0.5).eval()
    experts = router(_probable(rows), None, limited=True).experts
    assert experts[:, 0].tolist() == [0, 0, 1, 1, 2]
    assert experts[:, 1].tolist() == [-1, -1, 2, -1, -1]


def test_gshard_loss_counts_first_choices_only():
    rows = [[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.1, 0.2, 0.7]]
    routing = _gshard(moe_aux_loss_coeff=1.0)(_probable(rows), None, limited=True)
    means = [1.2 / 3, 0.8 / 3, 1.0 / 3]
    expected = 3 * (2 / 3 * means[0] + 1 / 3 * means[2])
    torch.testing.assert_close(routing.loss.item(), expected)


def test_base_is_balanced_in_training_and_greedy_in_evaluation():
    router = _router(SMLPBaseRouter, "base", 4)
    tokens = torch.randn(22, 4) + torch.tensor([3.0, 0.0, 0.0, 0.0])
    counts = router(tokens, None, limited=True).experts[:, 0].bincount(minlength=4)
    assert sorted(counts.tolist()) == [5, 5, 6, 6]
    greedy = router.eval()(tokens, None, limited=True)
    assert torch.equal(greedy.experts[:, 0], tokens.argmax(1))
    torch.testing.assert_close(greedy.weights[:, 0], tokens.max(1).values.sigmoid())
    assert greedy.loss is None


def test_base_takes_another_solver():
    router = _router(SMLPBaseRouter, "base", 4)
    router.assign = lambda scores: (torch.full((len(scores),), 2), torch.zeros(4))
    assert set(router(torch.randn(5, 4), None, limited=True).experts.flatten().tolist()) == {2}


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


def test_base_gradient_reaches_the_centroids_only_through_the_sigmoid():
    moe = make_model("base").model.layers[0].channel.train()
    hidden = torch.randn(1, 9, 32)
    layout, _ = make_model("base").model._layout(hidden, None, None, None)
    gradient = torch.randn(1, 9, 32)
    moe(hidden, layout, hidden)[0].backward(gradient)
    centroids = moe.router.weight
    experts = moe.router(hidden[0], None, limited=True).experts[:, 0]
    expected = torch.zeros_like(centroids)
    for token, expert in enumerate(experts.tolist()):
        gate = (hidden[0, token] @ centroids[expert]).sigmoid()
        through = (
            gradient[0, token] * moe.experts._expert(hidden[0, token][None], expert)[0]
        ).sum()
        expected[expert] += through * gate * (1 - gate) * hidden[0, token]
    torch.testing.assert_close(centroids.grad, expected, rtol=1e-4, atol=1e-5)


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


@pytest.mark.parametrize("system", ["switch", "gshard", "base", "hash"])
def test_token_moe_equals_a_loop_over_tokens(system: str):
    model = make_model(system)
    moe = next(
        layer.channel for layer in model.model.layers if isinstance(layer.channel, SMLPTokenMoE)
    )
    hidden, ids = torch.randn(2, 7, 32), make_ids(2, 7)
    layout, _ = model.model._layout(hidden, ids, None, None)
    output, _ = moe(hidden, layout, hidden)
    for b in range(2):
        for t in range(7):
            routing = moe.router(hidden[b, t][None], ids[b, t][None], limited=False)
            expected = torch.zeros(32)
            for expert, weight in zip(routing.experts[0], routing.weights[0], strict=True):
                inner = functional.gelu(moe.experts.up_proj[expert] @ hidden[b, t])
                expected += weight * (moe.experts.down_proj[expert] @ inner)
            torch.testing.assert_close(output[b, t], expected, rtol=1e-5, atol=1e-5)


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


def test_an_earlier_token_never_loses_its_slot_to_a_later_one_of_its_sequence():
    """Drop policy `position`: in training, logits before position t do not depend on token t."""
    model = make_model("switch", moe_train_capacity_factor=0.5).train()
    ids = make_ids(3, 20)
    before = model(ids).logits
    for position in (1, 7, 19):
        changed = ids.clone()
        changed[:, position:] = (changed[:, position:] + 17) % 101
        after = model(changed).logits
        # The capacity depends on N only, which is the same.
        torch.testing.assert_close(after[:, :position], before[:, :position], rtol=1e-5, atol=1e-5)
