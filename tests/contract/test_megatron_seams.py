"""Every place where our code plugs into Megatron still has the shape that our code relies on.

When the pinned version moves, these say where to look. What raises an error in any training, such
as an argument that is gone, is left to the trainings.
"""

import inspect
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pytest
import torch
from megatron.core.models.backends import get_backend
from megatron.core.pipeline_parallel.schedules import forward_backward_no_pipelining
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import checkpoint
from megatron.core.tensor_parallel.random import is_checkpointing
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
)
from megatron.training.datasets.data_samplers import MegatronPretrainingSampler
from support.in_process import layer_config

from megatron_smlp.architectures import SlottedLayer
from megatron_smlp.layers.token_moe import token_moe_builder
from megatron_smlp.model import model_config

pytestmark = pytest.mark.usefixtures("megatron")


def test_the_pinned_minor_version():
    assert version("megatron-core").startswith("0.19."), "then every test of this file is due"


def test_an_empty_channel_slot_is_the_identity_without_parameters():
    layer = SlottedLayer(layer_config(architecture="gmlp"))
    assert isinstance(layer.mlp, IdentityOp)
    hidden = torch.randn(4, 1, layer.config.hidden_size)
    mixed, bias = layer.self_attention(layer.input_layernorm(hidden))
    output, _ = layer(hidden, attention_mask=None)
    torch.testing.assert_close(output, hidden + mixed + bias)


@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (0, 3), (2, 3)])
def test_which_samples_a_micro_batch_has(rank: int, ranks: int):
    """GShard's draws and validation rely on the order of Megatron's sampler."""
    sampler = MegatronPretrainingSampler(
        total_samples=40,
        consumed_samples=12,
        micro_batch_size=2,
        data_parallel_rank=rank,
        data_parallel_size=ranks,
    )
    batches = list(sampler)
    assert batches
    for number, batch in enumerate(batches):
        first = 12 + (number * ranks + rank) * 2
        assert batch == [first, first + 1]


def groups() -> ProcessGroupCollection:
    return ProcessGroupCollection.use_mpu_process_groups()


def test_the_layer_routes_what_it_is_given_and_dispatches_what_preprocess_returns():
    """BASE's layer receives the residual, and normalizes it between the two."""
    order: list[tuple[str, tuple[int, ...]]] = []

    class Layer(MoELayer):
        def route(self, hidden: torch.Tensor, padding_mask: Any = None) -> Any:
            order.append(("route", tuple(hidden.shape)))
            return super().route(hidden, padding_mask)

        def preprocess(self, hidden: torch.Tensor, probs: Any, routing_map: Any) -> Any:
            order.append(("preprocess", tuple(hidden.shape)))
            return super().preprocess(torch.zeros_like(hidden), probs, routing_map)

    config = layer_config(
        num_moe_experts=2,
        moe_router_topk=1,
        moe_router_pre_softmax=True,
        moe_token_dispatcher_type="alltoall",
        add_bias_linear=False,
    )
    build = token_moe_builder(config, get_backend(config.transformer_impl))
    submodules = build(config=config, pg_collection=groups()).submodules
    hidden = torch.randn(3, 2, config.hidden_size)
    output, _ = Layer(config, submodules)(hidden)
    assert order == [("route", (3, 2, 24)), ("preprocess", (3, 2, 24))]
    assert not output.any(), "experts without a bias see the zeros"


def test_a_layer_says_whether_it_gets_a_cuda_graph(monkeypatch: pytest.MonkeyPatch):
    """Megatron asks while building it, and only with its own graphs."""
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


@pytest.mark.parametrize("dispatcher", ["allgather", "alltoall"])
def test_a_capacity_tells_the_dispatcher_that_tokens_may_be_left_out(dispatcher: str):
    """One of four tokens is dropped: its output is zero, the others' are not."""
    config = layer_config(
        num_moe_experts=2,
        moe_router_topk=1,
        moe_router_pre_softmax=True,
        moe_token_dispatcher_type=dispatcher,
        moe_expert_capacity_factor=2.0,
        add_bias_linear=False,
    )

    class Router(torch.nn.Module):
        def __init__(self, **_: Any) -> None:
            super().__init__()

        def set_layer_number(self, number: int) -> None: ...

        def forward(self, hidden: torch.Tensor, _: Any) -> tuple[torch.Tensor, torch.Tensor]:
            sent = torch.tensor([[1, 0], [0, 1], [0, 0], [0, 1]])
            return sent.float(), sent.bool()

    backend = get_backend("local")
    experts = backend.grouped_mlp_modules(config.moe_grouped_gemm)
    layer = MoELayer(config, MoESubmodules(experts=experts, router=Router))
    output, _ = layer(torch.randn(4, 1, config.hidden_size))
    assert output.ne(0).any(-1)[:, 0].tolist() == [True, True, False, True]


def test_checkpointing_says_so_in_both_passes():
    seen: list[tuple[bool, bool]] = []

    def noted(hidden: torch.Tensor) -> torch.Tensor:
        seen.append((is_checkpointing(), torch.is_grad_enabled()))
        return hidden * 2

    checkpoint(noted, False, torch.ones(2, requires_grad=True)).sum().backward()
    assert seen == [(True, False), (True, True)]
    assert not is_checkpointing()


def test_our_config_hides_no_field_of_the_models(parse: Callable[..., Any]):
    """GPTModelConfig writes fields that it shares with the layer config into the latter."""
    config = model_config(parse("--architecture gmlp --max-position-embeddings 48"))
    model = build(config)
    assert model.max_sequence_length == 48
    assert model.decoder.layers[0].self_attention.spatial.length == 16


def build(config: Any) -> Any:
    from megatron.training.models.gpt import GPTModelBuilder

    return GPTModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups())


def test_a_forward_step_returns_a_sum_and_its_number_of_tokens():
    """The gradient must be that of sum / tokens, averaged over the micro-batches."""
    config = layer_config(calculate_per_token_loss=False)
    model = torch.nn.Linear(3, 1, bias=False)
    model.config, model.set_input_tensor, model.model_type = config, lambda _: None, None
    batches = [torch.randn(2, 3), torch.randn(5, 3)]
    seen: list[tuple[Any, ...]] = []

    def step(data_iterator: Any, network: Any) -> tuple[torch.Tensor, Any]:
        seen.append((data_iterator, network))
        output = network(next(data_iterator))
        return output, lambda y: (y.sum(), torch.tensor(len(y)), {"lm loss": y.sum().detach()})

    iterator = iter(batches)
    reports = forward_backward_no_pipelining(
        forward_step_func=step,
        data_iterator=iterator,
        model=model,
        num_microbatches=2,
        seq_length=2,
        micro_batch_size=1,
        forward_only=False,
    )
    assert seen == [(iterator, model)] * 2
    assert [set(report) for report in reports] == [{"lm loss"}] * 2
    mean = sum(batch.mean(0) for batch in batches) / 2
    torch.testing.assert_close(model.weight.grad[0], mean)
