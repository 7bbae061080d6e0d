"""Every place where our code plugs into Megatron still has the shape that our code relies on.

When the pinned version moves, these fail first and say where to look. What can be called is called
with a part that records its arguments; signatures are compared where a call would need a run.
"""

import inspect
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pytest
import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import get_backend
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel.schedules import forward_backward_no_pipelining
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import checkpoint
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import is_checkpointing
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec, import_module
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    _get_block_submodules,
)
from megatron.core.transformer.transformer_layer import (
    BaseTransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)
from megatron.training.datasets.data_samplers import MegatronPretrainingSampler
from support.in_process import layer_config

from megatron_smlp import architectures
from megatron_smlp.architectures import SlottedLayer, SMLPTransformerConfig
from megatron_smlp.layers.norms import TorchNorm
from megatron_smlp.layers.spatial_gating import SpatialGating
from megatron_smlp.layers.token_moe import token_moe_builder
from megatron_smlp.model import model_config, transformer_config

pytestmark = pytest.mark.usefixtures("megatron")


def names(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


class Noted(torch.nn.Module):
    """Fills a slot and records how it was built and called."""

    built: dict[str, Any]
    called: tuple[tuple[Any, ...], dict[str, Any]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        type(self).built = dict(enumerate(args)) | kwargs

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        type(self).called = (args, kwargs)
        return torch.zeros_like(args[0]), None


def test_the_pinned_minor_version():
    assert version("megatron-core").startswith("0.19."), "then every test of this file is due"


class TestLayerSlots:
    def test_how_a_layer_builds_and_calls_its_mixer(self, monkeypatch: pytest.MonkeyPatch):
        """SpatialGating must accept what Megatron passes to SelfAttention."""

        class Mixer(Noted):
            pass

        monkeypatch.setattr(
            architectures,
            "layer_submodules",
            lambda config, slots: TransformerLayerSubmodules(
                input_layernorm=TorchNorm,
                self_attention=ModuleSpec(module=Mixer),
                self_attn_bda=get_bias_dropout_add,
            ),
        )
        layer = SlottedLayer(layer_config(), layer_number=2)
        hidden = torch.randn(4, 1, layer.config.hidden_size)
        layer(hidden, attention_mask=None)
        assert set(Mixer.built) == {"config", "layer_number", "pg_collection", "name"}
        assert Mixer.built["layer_number"] == 2
        accepted = names(SpatialGating.__init__)
        assert {"config", "layer_number", "pg_collection", "name"} <= set(accepted)
        args, kwargs = Mixer.called
        assert len(args) == 1, "the mixer gets the hidden states, and everything else by name"
        assert args[0].shape == hidden.shape
        assert "attention_mask" in kwargs

    def test_how_a_layer_builds_its_channel_mixer(self, monkeypatch: pytest.MonkeyPatch):
        class Channel(Noted):
            def forward(self, hidden: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, None]:
                return hidden, None

        monkeypatch.setattr(
            architectures,
            "layer_submodules",
            lambda config, slots: TransformerLayerSubmodules(mlp=Channel),
        )
        SlottedLayer(layer_config())
        # Our partial in token_moe_builder gives MoELayer's other parameters.
        given = {"config", "pg_collection", "is_mtp_layer", "name"}
        assert set(Channel.built) == given
        assert given <= set(names(MoELayer.__init__))

    def test_an_empty_channel_slot_is_the_identity_without_parameters(self):
        layer = SlottedLayer(layer_config(architecture="gmlp"))
        assert isinstance(layer.mlp, IdentityOp)
        hidden = torch.randn(4, 1, layer.config.hidden_size)
        mixed, bias = layer.self_attention(layer.input_layernorm(hidden))
        output, _ = layer(hidden, attention_mask=None)
        torch.testing.assert_close(output, hidden + mixed + bias)

    def test_how_the_block_builds_a_layer(self, parse: Callable[..., Any]):
        """SlottedLayer names four of the arguments and passes the rest on."""
        given: dict[str, Any] = {}

        class NotedLayer(SlottedLayer):
            def __init__(self, **kwargs: Any) -> None:
                given.update(kwargs)
                super().__init__(**kwargs)

        config = model_config(parse("--architecture gmlp"))
        spec = TransformerBlockSubmodules(
            layer_specs=[ModuleSpec(module=NotedLayer)] * config.transformer.num_layers,
            layer_norm=TorchNorm,
        )
        config.transformer_layer_spec = lambda _: spec
        build(config)
        assert {"config", "layer_number", "pg_collection", "vp_stage"} <= set(given)
        assert given["layer_number"] == config.transformer.num_layers, (
            "from one, local to the stage"
        )


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


class TestTokenMoE:
    def test_how_the_layer_builds_router_and_experts(self):
        class Router(Noted):
            def set_layer_number(self, number: int) -> None: ...

        class Experts(Noted):
            pass

        config = layer_config(num_moe_experts=2, moe_token_dispatcher_type="alltoall")
        MoELayer(config, MoESubmodules(experts=Experts, router=Router))
        assert set(Router.built) == {"config", "pg_collection", "is_mtp_layer"}
        assert Experts.built.pop(0) == 2, "the number of experts on this rank comes first"
        assert Experts.built.pop(1) is config, "then the config, both without a name"
        assert set(Experts.built) == {"pg_collection", "name"}

    def test_the_layer_routes_what_it_is_given_and_dispatches_what_preprocess_returns(self):
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

    def test_what_a_layer_calls_in_front_of_its_channel_slot(self):
        layer = SlottedLayer(layer_config())
        assert layer.recompute_pre_mlp_layernorm is False

    def test_a_layer_says_whether_it_gets_a_cuda_graph(self, monkeypatch: pytest.MonkeyPatch):
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
    def test_a_capacity_tells_the_dispatcher_that_tokens_may_be_left_out(self, dispatcher: str):
        """One of four tokens is dropped: its output is zero, the others' are not."""
        config = layer_config(
            num_moe_experts=2,
            moe_router_topk=1,
            moe_router_pre_softmax=True,
            moe_token_dispatcher_type=dispatcher,
            moe_expert_capacity_factor=2.0,
            add_bias_linear=False,
        )

        class Router(Noted):
            def set_layer_number(self, number: int) -> None: ...

            def forward(self, hidden: torch.Tensor, _: Any) -> tuple[torch.Tensor, torch.Tensor]:
                sent = torch.tensor([[1, 0], [0, 1], [0, 0], [0, 1]])
                return sent.float(), sent.bool()

        backend = get_backend("local")
        experts = backend.grouped_mlp_modules(config.moe_grouped_gemm)
        layer = MoELayer(config, MoESubmodules(experts=experts, router=Router))
        output, _ = layer(torch.randn(4, 1, config.hidden_size))
        assert output.ne(0).any(-1)[:, 0].tolist() == [True, True, False, True]

    def test_checkpointing_says_so_in_both_passes(self):
        seen: list[tuple[bool, bool]] = []

        def noted(hidden: torch.Tensor) -> torch.Tensor:
            seen.append((is_checkpointing(), torch.is_grad_enabled()))
            return hidden * 2

        checkpoint(noted, False, torch.ones(2, requires_grad=True)).sum().backward()
        assert seen == [(True, False), (True, True)]
        assert not is_checkpointing()


class TestModel:
    def test_the_layer_spec_may_be_a_function_of_the_stage(self, parse: Callable[..., Any]):
        config = model_config(parse("--architecture gmlp"))
        plain = config.transformer_layer_spec
        stages: list[Any] = []

        def noted(model: Any, vp_stage: Any = "missing") -> Any:
            stages.append(vp_stage)
            assert model is config
            return plain(model, vp_stage=vp_stage)

        config.transformer_layer_spec = noted
        assert isinstance(build(config), GPTModel)
        assert stages == [None]

    def test_block_submodules_are_taken_as_they_are(self):
        config = layer_config(num_layers=3)
        block = TransformerBlockSubmodules(layer_specs=[], layer_norm=TorchNorm)
        assert _get_block_submodules(config, block, None, 0) is block

    def test_a_layer_spec_is_repeated_for_every_layer(self):
        """`--spec megatron_smlp.architectures gmlp` relies on this."""
        assert issubclass(SlottedLayer, BaseTransformerLayer)
        config = layer_config(num_layers=3)
        spec = import_module(["megatron_smlp.architectures", "gmlp"])
        assert spec is architectures.gmlp
        assert _get_block_submodules(config, spec, None, 0).layer_specs == [spec] * 3

    def test_arguments_fill_our_config_class(self, parse: Callable[..., Any]):
        config = transformer_config(parse("--architecture gmlp --spatial-heads 4"))
        assert type(config) is SMLPTransformerConfig
        assert (config.spatial_heads, config.spatial_length, config.hidden_size) == (4, 16, 32)

    def test_our_config_hides_no_field_of_the_models(self, parse: Callable[..., Any]):
        """GPTModelConfig writes fields that it shares with the layer config into the latter."""
        config = model_config(parse("--architecture gmlp --max-position-embeddings 48"))
        model = build(config)
        assert model.max_sequence_length == 48
        assert model.decoder.layers[0].self_attention.spatial.length == 16


def build(config: Any) -> Any:
    from megatron.training.models.gpt import GPTModelBuilder

    return GPTModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups())


class TestParts:
    def test_local_backend(self):
        from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

        backend = get_backend("local")
        assert backend.column_parallel_linear() is ColumnParallelLinear
        assert backend.row_parallel_linear() is RowParallelLinear
        config = layer_config(num_moe_experts=2)
        experts = backend.grouped_mlp_modules(config.moe_grouped_gemm)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        assert len(experts(2, config, pg_collection=groups).local_experts) == 2

    def test_attributes_of_a_parallel_parameter(self):
        parameter = torch.nn.Parameter(torch.zeros(2))
        set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)
        assert parameter.tensor_model_parallel


class TestCheckpoints:
    @pytest.mark.parametrize("architecture", ["transformer", "gmlp"])
    def test_layers_are_named_by_their_number(self, architecture: str, parse: Callable[..., Any]):
        """Layers of a model may differ, so Megatron must not stack them into one tensor."""
        model = build(model_config(parse(f"--architecture {architecture} --num-attention-heads 4")))
        keys = {entry.key for entry in model.sharded_state_dict().values() if hasattr(entry, "key")}
        for number in range(4):
            assert any(key.startswith(f"decoder.layers.{number}.self_attention.") for key in keys)

    def test_our_parameters_are_all_in_it(self):
        mixer = SlottedLayer(layer_config(architecture="gmlp", spatial_heads=2)).self_attention
        sharded = mixer.sharded_state_dict(prefix="mixer.")
        assert set(sharded) >= {f"mixer.{name}" for name, _ in mixer.named_parameters()}


class TestTrainingLoop:
    def test_a_forward_step_returns_a_sum_and_its_number_of_tokens(self):
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
