"""Toeplitz spatial gating matches the dense one with the same matrices: outputs, every gradient."""

from typing import Any

import pytest
import torch
from support.in_process import layer_config
from torch import Tensor

from megatron_smlp.architectures import SlottedLayer

pytestmark = pytest.mark.usefixtures("megatron")

LENGTH = 16
PREFIX = 4
PARTIAL = {"feature_router": "partial", "num_feature_experts": 3, "num_feature_chunks": 6}
SYSTEMS: dict[str, dict[str, Any]] = {
    "one_head": {"architecture": "gmlp"},
    "heads": {"architecture": "gmlp", "spatial_heads": 3},
    "amlp": {"architecture": "amlp", "spatial_heads": 2},
    "deterministic": {
        "architecture": "smlp",
        "feature_router": "deterministic",
        "num_feature_experts": 3,
    },
    "partial": {"architecture": "smlp", **PARTIAL},
}


def _layer(system: str, *, length: int, toeplitz: bool) -> SlottedLayer:
    config = layer_config(
        **SYSTEMS[system],
        spatial_length=length,
        toeplitz=toeplitz,
        prefix_fraction=(PREFIX + 0.5) / length,
    )
    return SlottedLayer(config).double()


def _matrices(vectors: Tensor, length: int) -> Tensor:
    matrices = vectors.new_zeros(len(vectors), length, length)
    for t in range(length):
        for s in range(max(0, t + 1 - vectors.shape[1]), t + 1):
            matrices[:, t, s] = vectors[:, t - s]
    return matrices


def _by_distance(gradient: Tensor, num_distances: int) -> Tensor:
    """Return the sums along the diagonals of [h, T', T'] matrices."""
    sums = [
        gradient.diagonal(-k, 1, 2).sum(-1) for k in range(min(num_distances, len(gradient[0])))
    ]
    return torch.stack(sums, dim=1)


@pytest.mark.parametrize("tokens", [3, LENGTH, 23])
@pytest.mark.parametrize("system", SYSTEMS)
def test_equals_the_dense_layer_with_its_matrices(system: str, tokens: int):
    """Shorter than T = 16, as long, and longer."""
    longest = max(tokens, LENGTH)
    ours = _layer(system, length=LENGTH, toeplitz=True)
    dense = _layer(system, length=longest, toeplitz=False)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    weight, bias = "self_attention.spatial.weight", "self_attention.spatial.bias"
    state = dict(ours.state_dict())
    state[weight] = _matrices(state[weight], longest)
    state[bias] = state[bias].expand(-1, longest)
    dense.load_state_dict(state)

    values, upstream = torch.randn(2, tokens, 3, ours.config.hidden_size).double()
    results = []
    for layer in (ours, dense):
        inputs = values.clone().requires_grad_()
        output = layer(inputs, attention_mask=None)[0]
        (output * upstream).sum().backward()
        gradients = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
        results.append({"output": output, "input": inputs.grad} | gradients)
    left, right = results
    right[bias] = right[bias].sum(dim=1, keepdim=True)
    right[weight] = _by_distance(right[weight], LENGTH)
    assert left.keys() == right.keys()
    assert left[weight][:, tokens:].count_nonzero() == 0
    left[weight] = left[weight][:, : right[weight].shape[1]]
    for name, ours_is in left.items():
        # The prefix router computes in fp32, whatever the rest does.
        exactly = 1e-9 if "partial" not in system else 1e-5
        torch.testing.assert_close(
            ours_is,
            right[name],
            rtol=exactly,
            atol=exactly,
            msg=lambda text, name=name: f"{name}: {text}",
        )
