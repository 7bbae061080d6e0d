"""CausalRN in Megatron's slot against a loop over pairs of tokens: outputs and every gradient."""

from argparse import Namespace
from typing import Any

import pytest
import torch
from support.in_process import layer_config
from support.naive_loops import assert_equals
from torch import Tensor
from torch.nn import functional

from megatron_smlp.architectures import SlottedLayer
from megatron_smlp.layers.causal_rn import CausalRN, check_flags

pytestmark = pytest.mark.usefixtures("megatron")

BATCH, LENGTH, EPS = 3, 16, 1e-5


def mixer(**options: Any) -> CausalRN:
    config = layer_config(architecture="causal_rn", spatial_length=LENGTH, **options)
    layer: CausalRN = SlottedLayer(config).self_attention
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return layer


def n(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + EPS).sqrt()


def naive(layer: CausalRN, x: Tensor) -> Tensor:
    """The equation, pair by pair. x: <float>[T', B, D]."""
    both = functional.linear(x, layer.linear_fc1.weight, layer.linear_fc1.bias)
    a, b = (n(part) for part in both.chunk(2, dim=-1))
    rows = []
    for t in range(len(x)):
        if layer.quadratic:
            pairs = [torch.exp(n(a[t] + b[s])) for s in range(t + 1)]
            rows.append(n(sum(pairs) / (t + 1)))
            continue
        mean = torch.exp(a[t]) * sum(torch.exp(b[s]) for s in range(t + 1)) / (t + 1)
        # Its scale is not seen by n, but for eps: the layer's is 1 for the largest feature.
        rows.append(n(mean / mean.detach().amax(-1, keepdim=True)))
    return functional.linear(torch.stack(rows), layer.linear_fc2.weight, layer.linear_fc2.bias)


@pytest.mark.parametrize("tokens", [1, 7, LENGTH])
@pytest.mark.parametrize("kind", ["linear", "quadratic"])
@pytest.mark.parametrize("width", [None, 40])
def test_equals_the_naive_loop(kind: str, width: int | None, tokens: int):
    layer = mixer(causal_rn_kind=kind, relation_width=width).double()
    assert layer.linear_fc2.weight.shape == (24, width or 24)
    values = torch.randn(2, tokens, BATCH, layer.config.hidden_size).double()

    def ours(x: Tensor) -> Tensor:
        output, bias = layer(x)
        return output + bias

    assert_equals(layer, ours, lambda x: naive(layer, x), values, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("kind", ["linear", "quadratic"])
def test_in_bf16_only_the_projections_are_rounded(kind: str):
    layer = mixer(causal_rn_kind=kind)
    x = torch.randn(LENGTH, BATCH, 24).bfloat16()
    exact = naive(layer.double(), x.double())
    rounded = layer.bfloat16()(x)
    output = rounded[0] + rounded[1]
    assert output.dtype == torch.bfloat16
    error = (output.double() - exact).abs().max() / exact.abs().max()
    assert 0 < error < 0.05


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensor_model_parallel_size": 5}, r"size 5 does not divide --hidden-size 24: choose"),
        ({"tensor_model_parallel_size": 3, "relation_width": 40}, r"divide --relation-width 40"),
        ({"context_parallel_size": 2}, r"size 2 is not available with CausalRN"),
        (
            {"relation_width": 8192, "causal_rn_kind": "quadratic"},
            r"--relation-width 8192 with --causal-rn-kind quadratic, .* from 6401 on: give",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str):
    sizes = {"tensor_model_parallel_size": 1, "context_parallel_size": 1, "relation_width": None}
    sizes |= {"causal_rn_kind": "linear"}
    check_flags(Namespace(hidden_size=24, **sizes))
    with pytest.raises(ValueError, match=message):
        check_flags(Namespace(hidden_size=24, **{**sizes, **changes}))
