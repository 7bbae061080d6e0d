"""Spatial gating in Megatron's slot matches slower references: outputs and every gradient."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from support.in_process import layer_config
from support.naive_loops import assert_equals
from torch import Tensor, nn
from torch.nn import functional

from megatron_smlp.architectures import SlottedLayer
from megatron_smlp.layers.spatial_gating import SpatialGating, SpatialProjection

pytestmark = pytest.mark.usefixtures("megatron")

BATCH = 3


def gmlp_layer(*, heads: int = 1, length: int = 16) -> SlottedLayer:
    config = layer_config(architecture="gmlp", spatial_heads=heads, spatial_length=length)
    layer = SlottedLayer(config)
    _stir(layer.parameters())
    return layer


def _stir(parameters: Iterable[nn.Parameter]) -> None:
    """Move away from the initial values, where the gate is almost 1 and hides wrong mixing."""
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter), alpha=0.3)


def _forward(layer: SlottedLayer) -> Callable[[Tensor], Tensor]:
    return lambda x: layer(x, attention_mask=None)[0]


def naive_gating(mixer: SpatialGating, x: Tensor, *, heads: int) -> Tensor:
    """Compute the equation by head and token, with Megatron's weights. x: [T', B, D]."""
    u = functional.gelu(functional.linear(x, mixer.linear_fc1.weight, mixer.linear_fc1.bias))
    u1, u2 = u.chunk(2, dim=-1)
    width = u2.shape[-1] // heads
    gates = []
    for k in range(heads):
        chunk = slice(k * width, (k + 1) * width)
        scale, shift = mixer.norm.weight[chunk], mixer.norm.bias[chunk]
        v = functional.layer_norm(u2[..., chunk], (width,), scale, shift, mixer.norm.eps)
        rows = [
            sum(mixer.spatial.weight[k, t, s] * v[s] for s in range(t + 1))
            + mixer.spatial.bias[k, t]
            for t in range(len(x))
        ]
        gates.append(torch.stack(rows))
    gated = u1 * torch.cat(gates, dim=-1)
    return functional.linear(gated, mixer.linear_fc2.weight, mixer.linear_fc2.bias)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize(("length", "tokens"), [(63, 63), (16, 16), (16, 5), (16, 1)])
def test_heads_equal_the_naive_loop(heads: int, length: int, tokens: int):
    # In double precision: reordered sums of up to 63 terms differ by rounding in single.
    mixer = gmlp_layer(heads=heads, length=length).self_attention.double()
    values = torch.randn(2, tokens, BATCH, mixer.config.hidden_size).double()

    def slotted(x: Tensor) -> Tensor:
        output, bias = mixer(x)  # the layer adds the bias, fused with dropout and residual
        return output + bias

    def naive(x: Tensor) -> Tensor:
        return naive_gating(mixer, x, heads=heads)

    assert_equals(mixer, slotted, naive, values, rtol=1e-10, atol=1e-10)


def test_a_longer_sequence_is_refused_with_its_length_and_the_flag():
    layer = gmlp_layer()
    expected = r"sequence of 17 tokens is longer than --seq-length 16.*Cut the sequence"
    with pytest.raises(ValueError, match=expected):
        layer(torch.randn(17, 1, layer.config.hidden_size), attention_mask=None)


@pytest.mark.parametrize("heads", [1, 4])
def test_initial_values(heads: int):
    """M ~ U(-1e-3/T, 1e-3/T) in the lower triangle, b = 1, LN the identity."""
    length = 64
    spatial = SpatialProjection(heads, length=length, dtype=torch.float32)
    bound = 1e-3 / length
    lower = spatial.weight.detach()[:, *torch.tril_indices(length, length)]
    assert lower.abs().max() <= bound
    # A uniform distribution, not merely something small: its deciles, to 5 % of the bound.
    deciles = torch.linspace(-0.8, 0.8, 9)
    found = torch.quantile(lower.flatten() / bound, (deciles + 1) / 2)
    torch.testing.assert_close(found, deciles, rtol=0, atol=0.05)
    assert torch.equal(spatial.weight, spatial.weight.tril())
    assert torch.equal(spatial.bias, torch.ones(heads, length))
    if heads > 1:
        assert not torch.equal(spatial.weight[0], spatial.weight[1])


def test_initial_values_in_fp16_are_many():
    """1e-3 / 1024 is below fp16's normal numbers: only some thirty values could be drawn."""
    weight = SpatialProjection(1, length=1024, dtype=torch.float16).weight.detach()
    assert weight.abs().max() <= torch.finfo(torch.float16).tiny
    assert len(weight.unique()) > 1000


def test_initial_values_do_not_depend_on_the_tensor_parallel_size():
    """Each rank draws all heads and keeps its own, so two halves are the whole."""

    def draw(count: int, first: int) -> Tensor:
        torch.manual_seed(5)
        return SpatialProjection(
            count, length=8, dtype=torch.float32, first_head=first, total_heads=4
        ).weight

    whole = draw(4, 0)
    assert torch.equal(torch.cat([draw(2, 0), draw(2, 2)]), whole)
    assert torch.equal(torch.cat([draw(1, head) for head in range(4)]), whole)


@pytest.mark.parametrize("tokens", [16, 5])
def test_deterministic_feature_moe_equals_heads(tokens: int):
    """Chunk i goes to expert i: bitwise the same as with as many heads as experts."""
    heads = gmlp_layer(heads=4)
    routed = SlottedLayer(
        layer_config(architecture="smlp", feature_router="deterministic", num_feature_experts=4)
    )
    routed.load_state_dict(heads.state_dict())
    inputs = torch.randn(tokens, BATCH, heads.config.hidden_size)
    assert torch.equal(_forward(routed)(inputs), _forward(heads)(inputs))


@pytest.mark.parametrize("kind", [{}, {"architecture": "mixer", "mixer_expansion": True}])
def test_the_activation_of_a_gated_ffn_is_none_of_a_mixers(kind: dict[str, Any]):
    """With --swiglu, which is for experts."""
    swiglu = {"gated_linear_unit": True, "activation_func": functional.silu}
    kind = {"architecture": "gmlp", **kind}
    plain, gated = (
        SlottedLayer(layer_config(**kind, **flags)).self_attention for flags in ({}, swiglu)
    )
    _stir(plain.parameters())
    gated.load_state_dict(plain.state_dict())
    inputs = torch.randn(16, BATCH, 24)
    assert torch.equal(gated(inputs)[0], plain(inputs)[0])


def test_every_sharded_parameter_is_marked():
    """Megatron's gradient norm counts an unmarked one once per TP group, not once per rank.

    At the initial values these gradients are so small that a whole run would not show it.
    """
    mixer = gmlp_layer(heads=4).self_attention
    for parameter in (*mixer.norm.parameters(), *mixer.spatial.parameters()):
        assert parameter.tensor_model_parallel
        assert (parameter.partition_dim, parameter.partition_stride) == (0, 1)
