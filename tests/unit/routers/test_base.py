"""BASE: what it reads, the prices that it keeps, and evaluation and gates that use them."""

from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel.random import checkpoint
from support.in_process import layer_config
from support.routers import make_router
from torch import Tensor
from torch.nn import functional

from megatron_smlp.architectures import SlottedLayer
from megatron_smlp.ops.balanced_assignment import balanced_assignment, priced_assignment
from megatron_smlp.routers.base import update_prices

pytestmark = pytest.mark.usefixtures("megatron")

EXPERTS = 4
READS = ["residual", "norm"]
GATES = ["score", "price"]


def base_layer(**changes: Any) -> Any:
    config = layer_config(
        architecture="gmlp",
        token_router="base",
        num_moe_experts=EXPERTS,
        moe_router_topk=1,
        moe_router_pre_softmax=True,
        moe_token_dispatcher_type="alltoall",
        moe_ffn_hidden_size=40,
        **changes,
    )
    layer = SlottedLayer(config)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return layer


def by_the_equation(layer: Any, x: Tensor, reads: str, gate: str) -> Tensor:
    """Return x + sigmoid(v . w_e) f_e(LN x) with v = x or LN x, or with the priced, centered scores
    in place of v . w_e; x: <fp64>[n, D], residual of the slot."""
    norm, moe = layer.pre_mlp_layernorm, layer.mlp
    h = functional.layer_norm(
        x, x.shape[-1:], norm.weight.double(), norm.bias.double(), layer.config.layernorm_epsilon
    )
    scores = (x if reads == "residual" else h) @ moe.router.weight.double().T
    if layer.training:
        experts, prices = priced_assignment(scores.detach())
        mean = scores.mean(dim=0)  # no gradient along a shift of all of an expert's scores
        priced = scores - mean + (mean - prices.double()).detach()
    else:
        prices = moe.router.prices.double()
        priced = scores - prices
        experts = (priced if gate == "price" else scores).argmax(dim=-1)
    matrices = [
        (expert.linear_fc1.weight.double().T, expert.linear_fc2.weight.double().T)
        for expert in moe.experts.local_experts
    ]
    outputs = [functional.gelu(h @ up) @ down for up, down in matrices]
    chosen = torch.stack(outputs)[experts, torch.arange(len(x))]
    weighing = priced - priced.mean(dim=1, keepdim=True) if gate == "price" else scores
    return x + weighing.gather(1, experts[:, None]).sigmoid() * chosen


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("reads", READS)
def test_layer_is_the_equation(reads: str, gate: str, training: bool):
    """Outputs and all gradients of the channel slot; the residual's spread is far from 1."""
    layer = base_layer(base_routing_input=reads, base_gate=gate).train(training)
    layer.mlp.router.prices.normal_()
    x = (3 + 5 * torch.randn(7, 2, 24)).requires_grad_()
    output = layer._forward_mlp(x)
    direction = torch.randn_like(output)
    names = [n for n, _ in layer.named_parameters() if n.startswith(("mlp.", "pre_mlp"))]
    leaves = [x, *(layer.get_parameter(name) for name in names)]
    expected = by_the_equation(layer, x.double().flatten(0, 1), reads, gate).view_as(output)
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-4)
    ours = torch.autograd.grad(output, leaves, direction, allow_unused=True)
    theirs = torch.autograd.grad(expected, leaves, direction.double(), allow_unused=True)
    for name, mine, reference in zip(["x", *names], ours, theirs, strict=True):
        zero = torch.zeros(())
        mine, reference = (zero if g is None else g for g in (mine, reference))
        torch.testing.assert_close(mine, reference.expand_as(mine), rtol=1e-3, atol=1e-3, msg=name)


class TestPrices:
    def test_they_even_the_greedy_choice(self):
        """Prices are in the unit of the scores, whatever that is."""
        scores = 40 * torch.randn(4096, 8) + 100 * torch.arange(8)
        experts, prices = priced_assignment(scores)
        assert torch.equal(experts, balanced_assignment(scores))
        assert scores.argmax(1).bincount(minlength=8).max() > 3 * 512
        loads = (scores - prices).argmax(1).bincount(minlength=8)
        assert loads.min() >= 508
        assert loads.max() <= 516
        assert prices.mean().abs() < 1e-3

    def test_a_step_takes_the_mean_of_its_micro_batches(self):
        router = make_router("base", num_experts=EXPERTS)
        batches = [torch.randn(5, 4, EXPERTS) + torch.arange(EXPERTS) for _ in range(4)]
        of_batch = [priced_assignment(batch.flatten(0, 1))[1] for batch in batches]
        router(batches[0])
        router(batches[1])
        update_prices([router], skipped=False)
        first = (of_batch[0] + of_batch[1]) / 2
        torch.testing.assert_close(router.prices, first)
        router(batches[2])
        update_prices([router], skipped=False)
        second = 0.95 * first + 0.05 * of_batch[2]
        torch.testing.assert_close(router.prices, second)
        router(batches[3])
        update_prices([router], skipped=True)
        torch.testing.assert_close(router.prices, second, msg="a skipped step changes nothing")
        router(batches[2])
        update_prices([router], skipped=False)
        torch.testing.assert_close(router.prices, 0.95 * second + 0.05 * of_batch[2])

    def test_neither_evaluation_nor_a_repeated_pass_is_counted(self):
        router = make_router("base", num_experts=EXPERTS)
        tokens = torch.randn(6, 1, EXPERTS, requires_grad=True)
        output = checkpoint(lambda x: router(x)[0], False, tokens)
        output.sum().backward()
        router.eval()(tokens)
        assert router.of_step[-1] == 1

    def test_a_cast_to_bf16_leaves_them_exact(self):
        router = make_router("base", num_experts=EXPERTS)
        router.prices.copy_(torch.tensor([0.1, 0.2, 0.3, -0.6]))
        before = router.prices.clone()
        router.bfloat16()
        assert router.weight.dtype == torch.bfloat16
        assert torch.equal(router.prices, before)

    def test_evaluation_by_them(self):
        router = make_router("base", num_experts=3, base_eval="prices").eval()
        router.prices.copy_(torch.tensor([0.5, 0.0, -0.5]))
        tokens = torch.tensor([[1.0, 0.7, 0.1], [2.0, 0.0, 0.0], [0.4, 0.3, 0.2]])
        probs, routing_map = router(tokens[:, None])
        assert routing_map.nonzero()[:, 1].tolist() == [1, 0, 2]
        torch.testing.assert_close(probs.sum(1), torch.tensor([0.7, 2.0, 0.2]).sigmoid())

    def test_priced_gates_do_not_feel_a_shift_of_an_experts_or_a_tokens_scores(self):
        """Nor do they cause one: the gradient has no component along it."""
        router = make_router("base", num_experts=EXPERTS, base_gate="price")
        tokens = torch.randn(50, 2, EXPERTS)
        constants = torch.tensor([5.0, -3.0, 0.0, 9.0]) + torch.randn(50, 2, 1)
        shifted = (tokens + constants).requires_grad_()
        (probs, sent), (same, same_sent) = router(tokens), router(shifted)
        assert torch.equal(sent, same_sent)
        torch.testing.assert_close(same, probs, rtol=0, atol=5e-3)
        (same * torch.randn_like(same)).sum().backward()
        assert shifted.grad.abs().max() > 0.1
        torch.testing.assert_close(shifted.grad.sum((0, 1)), torch.zeros(EXPERTS))
        torch.testing.assert_close(shifted.grad.sum(2), torch.zeros(50, 2))
