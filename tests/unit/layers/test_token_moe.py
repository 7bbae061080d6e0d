"""Token MoE in the channel slot: Megatron's MoELayer, experts without bias, any router."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.models.backends import get_backend
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.router import TopKRouter
from support.in_process import layer_config
from torch.nn import functional

from megatron_smlp.layers.token_dispatch import OneRankDispatcher, TopOneDispatcher
from megatron_smlp.layers.token_moe import ROWS, Experts, token_moe_builder

pytestmark = pytest.mark.usefixtures("megatron")

EXPERTS = 4


def moe_config(**changes: Any) -> Any:
    values = {
        "num_moe_experts": EXPERTS,
        "moe_router_topk": 1,
        "moe_router_pre_softmax": True,
        "moe_token_dispatcher_type": "alltoall",
        "moe_ffn_hidden_size": 96,
        "add_bias_linear": True,
    }
    return layer_config(**(values | changes))


process_groups = ProcessGroupCollection.use_mpu_process_groups


def layer_of(router: Any = TopKRouter, **changes: Any) -> Any:
    config = moe_config(**changes)
    build = token_moe_builder(config, get_backend(config.transformer_impl), router=router)
    return build(config=config, pg_collection=process_groups())


def gradients_of(
    experts: SequentialMLP,
    forward: Callable[..., tuple[torch.Tensor, None]],
    *,
    hidden: torch.Tensor,
    counts: list[int],
    weights: torch.Tensor,
) -> list[torch.Tensor]:
    """Return the output, and the gradients of tokens, weights and all experts, even idle ones."""
    inputs = [hidden, weights, *experts.parameters()]
    output, bias = forward(experts, hidden, torch.tensor(counts), weights)
    assert bias is None
    direction = torch.linspace(-1, 1, output.numel()).view_as(output).to(output.dtype)
    return [output, *torch.autograd.grad(output, inputs, direction)]


@pytest.mark.parametrize(
    ("dtype", "close"),
    [(torch.float32, {}), (torch.bfloat16, {"rtol": 2e-2, "atol": 2e-2})],
    ids=["fp32", "bf16"],
)
@pytest.mark.parametrize("counts", [[4, 0, 7, 2], [0, 0, 0, 0]], ids=str)
def test_weighting_outputs_is_weighting_hidden_layers(
    dtype: torch.dtype, close: dict[str, float], counts: list[int]
):
    """Ours matches Megatron's own forward with the same experts."""
    experts = layer_of(params_dtype=dtype).experts
    assert type(experts) is Experts
    hidden = torch.randn(sum(counts), experts.config.hidden_size, dtype=dtype, requires_grad=True)
    weights = torch.rand(sum(counts), requires_grad=True)
    given = {"hidden": hidden, "counts": counts, "weights": weights}
    ours = gradients_of(experts, Experts.forward, **given)
    megatrons = gradients_of(experts, SequentialMLP.forward, **given)
    assert ours[0].dtype == dtype
    for mine, theirs in zip(ours, megatrons, strict=True):
        torch.testing.assert_close(mine, theirs, **close)


@pytest.mark.parametrize(
    ("dtype", "rows"), [(torch.float32, [4, 0, 65]), (torch.bfloat16, [ROWS, 0, 2 * ROWS])]
)
def test_a_product_in_16_bits_has_one_of_few_shapes(dtype: torch.dtype, rows: list[int]):
    """oneDNN compiles a kernel for each shape."""
    experts = layer_of(params_dtype=dtype, num_moe_experts=3).experts
    seen = []
    for expert in experts.local_experts:
        expert.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    hidden = torch.randn(69, experts.config.hidden_size, dtype=dtype)
    assert len(experts.one_by_one(hidden, torch.tensor([4, 0, 65]))) == 69
    assert seen == rows


SWIGLU = {"gated_linear_unit": True, "activation_func": functional.silu}
ACTIVATIONS: dict[str, dict[str, Any]] = {
    "gelu": {},
    "swiglu": SWIGLU,
    "fused": SWIGLU | {"bias_activation_fusion": True},
    "clamped": SWIGLU | {"activation_func_clamp_value": 0.02, "glu_linear_offset": 1.0},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("counts", [[4, 0, 7, 2], [0, 0, 0, 0]], ids=str)
@pytest.mark.parametrize("changes", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_grouped_gemms_are_the_loop(dtype: torch.dtype, counts: list[int], changes: dict[str, Any]):
    """Outputs and gradients, with grouped_mm on the CPU; and weights are waited for."""
    experts = layer_of(params_dtype=dtype, **changes).experts
    called = []
    for expert in experts.local_experts:
        expert.linear_fc1.register_forward_pre_hook(lambda layer, _: called.append(layer))
    size = (sum(counts), experts.config.hidden_size)
    hidden = torch.randn(size, dtype=dtype, requires_grad=True)
    answers = []
    with torch.compiler.set_stance("force_eager"):  # compiling the fused one takes long
        for compute in (experts.grouped, experts.one_by_one):
            output = compute(hidden, torch.tensor(counts))
            direction = torch.linspace(-1, 1, output.numel()).view_as(output).to(dtype)
            inputs = [hidden, *experts.parameters()]
            answers.append([output, *torch.autograd.grad(output, inputs, direction)])
            assert called == [expert.linear_fc1 for expert in experts.local_experts]
            called.clear()
    for mine, theirs in zip(*answers, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_grouped_gemms_keep_no_copy_of_the_weights(monkeypatch: pytest.MonkeyPatch):
    """As large as all experts of a rank, it would be kept for each micro-batch in flight."""
    experts = layer_of().experts
    stack, stacked = torch.stack, []

    def watched(tensors: list[torch.Tensor]) -> torch.Tensor:
        made = stack(tensors)
        stacked.append(weakref.ref(made))
        return made

    monkeypatch.setattr(torch, "stack", watched)
    output = experts.grouped(torch.randn(7, experts.config.hidden_size), torch.tensor([4, 0, 1, 2]))
    assert [made() for made in stacked] == [None, None]
    output.backward(torch.ones_like(output))
    assert len(stacked) > 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"params_dtype": torch.float32}, "for bfloat16, not torch.bfloat16 with weights in"),
        ({"moe_ffn_hidden_size": 20}, "need widths divisible by 8, not 64 and 20"),
        ({"moe_ffn_hidden_size": 12} | SWIGLU, "need widths divisible by 8, not 64 and 12"),
        (SWIGLU, ""),
    ],
)
def test_experts_that_cannot_be_grouped_say_why_once(
    changes: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
):
    experts = layer_of(**({"params_dtype": torch.bfloat16, "hidden_size": 64} | changes)).experts
    assert reason in experts.cannot_group(torch.bfloat16)
    assert bool(experts.cannot_group(torch.bfloat16)) == bool(reason)
    assert len(caplog.records) == bool(reason)


@pytest.mark.parametrize(("topk", "kind"), [(1, TopOneDispatcher), (2, OneRankDispatcher)])
def test_one_rank_sends_the_same_tokens(topk: int, kind: type):
    """Ours matches Megatron's with the same weights: outputs and gradients."""

    def answers(dispatch: str) -> list[torch.Tensor]:
        torch.manual_seed(0)
        moe = layer_of(moe_router_topk=topk, token_dispatch=dispatch)
        assert (type(moe.token_dispatcher) is kind) == (dispatch == "sorted")
        hidden = torch.randn(5, 3, moe.config.hidden_size, requires_grad=True)
        output, _ = moe(hidden)
        direction = torch.linspace(-1, 1, output.numel()).view_as(output)
        return [output, *torch.autograd.grad(output, [hidden, *moe.parameters()], direction)]

    for mine, megatrons in zip(answers("sorted"), answers("megatron"), strict=True):
        assert torch.equal(mine, megatrons)
