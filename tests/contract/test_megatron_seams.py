"""Where our code relies on what Megatron does, and no error would say that it does otherwise.

What would end in a TypeError, or in other losses, is left to the tests that build and train layers.
"""

import inspect
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pytest
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.training.datasets.data_samplers import MegatronPretrainingSampler
from support.in_process import build_model, layer_config

from megatron_smlp.architectures import SlottedLayer

pytestmark = pytest.mark.usefixtures("megatron")


def test_the_pinned_minor_version():
    assert version("megatron-core").startswith("0.19."), "then every test of this folder is due"


@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (0, 3), (2, 3)])
def test_which_samples_a_micro_batch_has(rank: int, ranks: int):
    """GShard's draws and the validations count on the order of Megatron's sampler."""
    sampler = MegatronPretrainingSampler(
        total_samples=40,
        consumed_samples=12,
        micro_batch_size=2,
        data_parallel_rank=rank,
        data_parallel_size=ranks,
    )
    for number, batch in enumerate(sampler):
        first = 12 + (number * ranks + rank) * 2
        assert batch == [first, first + 1]


def test_a_layer_says_whether_it_gets_a_cuda_graph(monkeypatch: pytest.MonkeyPatch):
    """Asked while it is built, and only where graphs are Megatron's own."""
    given = []
    monkeypatch.setattr(
        TransformerLayer, "create_mcore_cudagraph_manager", lambda self, _: given.append(self)
    )
    config = layer_config(
        architecture="smlp",
        num_layers=3,
        num_dense_layers=2,
        feature_router="deterministic",
        num_feature_experts=2,
        cuda_graph_impl="local",
        cuda_graph_modules=[],
    )
    layers = [SlottedLayer(config, layer_number=number) for number in (1, 2, 3)]
    assert given == layers[:2]
    assert [layer.routes for layer in layers] == [False, False, True]
    assert "cudagraph_manager" in inspect.getsource(TransformerLayer.__call__) + (
        inspect.getsource(TransformerLayer._should_call_local_cudagraph)
    )


def test_our_config_hides_no_field_of_the_models(parse: Callable[..., Any]):
    """GPTModelConfig writes a field that the layer config has too into the layer config."""
    model = build_model(parse("--architecture gmlp --max-position-embeddings 48"))
    assert model.max_sequence_length == 48
    assert model.decoder.layers[0].self_attention.spatial.length == 16


@pytest.mark.parametrize("architecture", ["transformer", "gmlp"])
def test_layers_are_named_by_their_number(architecture: str, parse: Callable[..., Any]):
    """Layers of one model may differ, so Megatron must not stack them into one tensor."""
    model = build_model(parse(f"--architecture {architecture} --num-attention-heads 4"))
    keys = {entry.key for entry in model.sharded_state_dict().values() if hasattr(entry, "key")}
    for number in range(4):
        assert any(key.startswith(f"decoder.layers.{number}.self_attention.") for key in keys)
