"""The masked mixer matches a loop over heads and tokens: outputs and every gradient."""

from typing import Any

import pytest
import torch
from support.in_process import layer_config
from support.naive_loops import assert_equals
from torch import Tensor
from torch.nn import functional

from megatron_smlp.architectures import SlottedLayer
from megatron_smlp.layers.masked_mixer import MaskedMixer
from megatron_smlp.layers.spatial_gating import SpatialProjection

pytestmark = pytest.mark.usefixtures("megatron")

BATCH, LENGTH = 3, 16


def mixer(*, heads: int = 1, **options: Any) -> MaskedMixer:
    config = layer_config(
        architecture="mixer", spatial_heads=heads, spatial_length=LENGTH, **options
    )
    layer: MaskedMixer = SlottedLayer(config).self_attention
    assert isinstance(layer, MaskedMixer)
    with torch.no_grad():
        for parameter in layer.parameters():
            # What lies above the diagonal must not be read.
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return layer


def entry(spatial: SpatialProjection, head: int, t: int, s: int) -> Tensor:
    weight = spatial.weight[head]
    return weight[t - s] if weight.dim() == 1 else weight[t, s]


def loop(spatial: SpatialProjection, x: Tensor) -> Tensor:
    """tril(M_k) x_k + c_k. x: <float>[T', B, D]."""
    heads = len(spatial.weight)
    rows = []
    for t in range(len(x)):
        chunks = []
        for head, _ in enumerate(spatial.weight):
            values = x.chunk(heads, dim=-1)[head]
            mixed = sum(entry(spatial, head, t, s) * values[s] for s in range(t + 1))
            chunks.append(mixed + spatial.bias[head, min(t, spatial.bias.shape[1] - 1)])
        rows.append(torch.cat(chunks, dim=-1))
    return torch.stack(rows)


def naive(layer: MaskedMixer, x: Tensor) -> Tensor:
    mixed = loop(layer.spatial, x)
    if layer.spatial_out is None:
        return mixed
    return loop(layer.spatial_out, functional.gelu(mixed))


@pytest.mark.parametrize("tokens", [7, LENGTH])
@pytest.mark.parametrize("toeplitz", [False, True])
@pytest.mark.parametrize("expansion", [False, True])
@pytest.mark.parametrize("heads", [1, 3])
def test_equals_the_naive_loop(heads: int, expansion: bool, toeplitz: bool, tokens: int):
    layer = mixer(heads=heads, mixer_expansion=expansion, toeplitz=toeplitz).double()
    names = dict(layer.named_parameters())
    assert len(names) == (4 if expansion else 2)
    values = torch.randn(2, tokens, BATCH, layer.config.hidden_size).double()
    assert_equals(
        layer, lambda x: layer(x)[0], lambda x: naive(layer, x), values, rtol=1e-10, atol=1e-10
    )
