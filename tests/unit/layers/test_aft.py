"""AFT in Megatron's slot against a loop over tokens: outputs and every gradient."""

from argparse import Namespace
from typing import Any

import pytest
import torch
from support.in_process import layer_config
from support.naive_loops import assert_equals
from torch import Tensor
from torch.nn import functional

from megatron_smlp.architectures import SlottedLayer
from megatron_smlp.layers.aft import AttentionFree, check_flags

pytestmark = pytest.mark.usefixtures("megatron")

BATCH, LENGTH = 3, 16


def mixer(**options: Any) -> AttentionFree:
    config = layer_config(architecture="aft", spatial_length=LENGTH, **options)
    layer: AttentionFree = SlottedLayer(config).self_attention
    with torch.no_grad():
        for parameter in layer.parameters():
            # What lies above the diagonal of w must not be read.
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return layer


def naive(layer: AttentionFree, x: Tensor) -> Tensor:
    """The equation, token by token. x: <float>[T', B, D]."""
    qkv = functional.linear(x, layer.linear_qkv.weight, layer.linear_qkv.bias)
    heads = qkv.chunk(layer.config.num_attention_heads, dim=-1)
    q, k, v = (
        torch.cat(parts, dim=-1)
        for parts in zip(*(head.chunk(3, dim=-1) for head in heads), strict=True)
    )
    rows = []
    for t in range(len(x)):
        above, below = torch.zeros_like(q[0]), torch.zeros_like(q[0])
        for s in range(t + 1):
            w = 0.0 if layer.positions is None else layer.positions.weight[t, s]
            above = above + torch.exp(k[s] + w) * v[s]
            below = below + torch.exp(k[s] + w)
        rows.append(torch.sigmoid(q[t]) * above / below)
    return functional.linear(torch.stack(rows), layer.linear_proj.weight, layer.linear_proj.bias)


@pytest.mark.parametrize("tokens", [1, 7, LENGTH])
@pytest.mark.parametrize("kind", ["full", "simple"])
@pytest.mark.parametrize("heads", [4, 24])
def test_equals_the_naive_loop(kind: str, heads: int, tokens: int):
    layer = mixer(aft_kind=kind, num_attention_heads=heads).double()
    names = dict(layer.named_parameters())
    assert ("positions.weight" in names) == (kind == "full")
    values = torch.randn(2, tokens, BATCH, layer.config.hidden_size).double()

    def ours(x: Tensor) -> Tensor:
        output, bias = layer(x)
        return output + bias

    assert_equals(layer, ours, lambda x: naive(layer, x), values, rtol=1e-9, atol=1e-10)


def test_initial_weights_of_positions():
    layer = SlottedLayer(layer_config(architecture="aft", spatial_length=LENGTH)).self_attention
    weight = layer.positions.weight
    assert 0 < weight.abs().max() <= 1e-3 / LENGTH
    assert not weight.triu(1).any()


@pytest.mark.parametrize("kind", ["full", "simple"])
def test_a_longer_sequence_is_refused(kind: str):
    with pytest.raises(ValueError, match=r"17 tokens is longer than --seq-length 16: AFT has no"):
        mixer(aft_kind=kind)(torch.randn(LENGTH + 1, BATCH, 24))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 5}, r"--num-attention-heads 5 does not divide --hidden-size 24"),
        ({"tensor_model_parallel_size": 3}, r"size 3 does not divide --num-attention-heads 4"),
        ({"context_parallel_size": 2}, r"size 2 is not available with AFT"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, int], message: str):
    sizes = {"tensor_model_parallel_size": 1, "context_parallel_size": 1, "num_attention_heads": 4}
    check_flags(Namespace(hidden_size=24, **sizes))
    with pytest.raises(ValueError, match=message):
        check_flags(Namespace(hidden_size=24, **{**sizes, **changes}))
