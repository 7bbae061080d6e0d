"""Every architecture as a list of (token mixer, channel mixer) pairs in Megatron's two layer slots.

`megatron_smlp.systems` holds the tables: its `layer_slots` names what fills each slot of each
layer. This module turns those names into Megatron specs. A token mixer's spec is made by the
function in layers/ that its entry names; the channel mixers are

    mlp          Megatron's MLP
    token_moe    layers/token_moe.py (Megatron's MoELayer)
    none         nothing: the slot is the identity
    a plugin's   layers/hosted.py

Megatron-LM users can take the layers alone, without our training script:

    pretrain_gpt.py --spec megatron_smlp.architectures gmlp ...
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider, get_backend
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from megatron.core.utils import get_pg_rank
from torch import Tensor

from megatron_smlp.layers.hosted import hosted_spec
from megatron_smlp.layers.norms import norm_builder
from megatron_smlp.layers.projections import two_projections
from megatron_smlp.layers.spatial_gating import SpatialProjection
from megatron_smlp.layers.toeplitz import ToeplitzProjection
from megatron_smlp.layers.token_moe import ResidualRoutedMoELayer, token_moe_builder
from megatron_smlp.options import ModelOptions, options_of
from megatron_smlp.systems import (
    ARCHITECTURES,
    CHANNELS,
    MIXERS,
    LayerSlots,
    feature_router_class,
    layer_slots,
    load,
    token_router_class,
)


@dataclass
class SMLPTransformerConfig(TransformerConfig, ModelOptions):
    """Megatron's TransformerConfig, extended by our model flags."""

    spatial_length: int | None = None
    """T, tokens: the size of every spatial matrix; None: Megatron's --seq-length. (Not named
    `seq_length`, which would hide that of GPTModelConfig.)"""

    hash_vocab_size: int | None = None
    """HASH: size of the padded vocabulary, the number of entries of its table."""

    balanced_experts: Tensor | None = None
    """HASH: <int64>[ids of the tokenizer], the table of --hash-table balanced."""

    token_dispatch: str = "sorted"
    """--token-dispatch."""

    hetereogenous_dist_checkpoint: bool = True
    """Whether checkpoints name each layer by its number, as layers of one model differ."""

    def __post_init__(self) -> None:
        # Megatron allows tensor parallel experts only without biases, and checks the whole model's
        # flag. Our experts have none (layers/token_moe.py), whatever the other layers have.
        bias: bool = self.add_bias_linear
        self.add_bias_linear: bool = bias and self.num_moe_experts is None
        super().__post_init__()
        self.add_bias_linear = bias


class SlottedLayer(TransformerLayer):
    """A layer whose two slots are looked up in the table by its number in the whole model.

    Args:
        architecture: overrides the config's; set by a bare `--spec`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int = 1,
        pg_collection: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
        architecture: str | None = None,
        **kwargs: Any,
    ) -> None:
        pg_collection = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        offset = get_transformer_layer_offset(config, vp_stage, get_pg_rank(pg_collection.pp))
        slots = slots_of(config, architecture=architecture)[layer_number - 1 + offset]
        self.routes = slots.routes
        super().__init__(
            config,
            layer_submodules(config, slots),
            layer_number=layer_number,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
            **kwargs,
        )
        if isinstance(self.mlp, ResidualRoutedMoELayer):
            self.mlp.norm = self.pre_mlp_layernorm.__call__
            self.recompute_pre_mlp_layernorm = False  # this layer does not keep its output

    def create_mcore_cudagraph_manager(self, config: TransformerConfig) -> None:
        """Create no graph for layers that route (--cuda-graph-impl local).

        A graph would replay their kernels, but not the Python code that passes token ids, padding
        and samples to routers and counts their loads.
        """
        if not self.routes:
            super().create_mcore_cudagraph_manager(config)

    def _forward_pre_mlp_layernorm(self, hidden_states: Tensor) -> Tensor:
        """Apply Megatron's norm before the `mlp` slot; BASE's layer gets x and normalizes it."""
        if isinstance(self.mlp, ResidualRoutedMoELayer):
            return hidden_states
        return super()._forward_pre_mlp_layernorm(hidden_states)


def slots_of(config: TransformerConfig, *, architecture: str | None = None) -> list[LayerSlots]:
    """Return the table's slots of every layer for this config."""
    options = options_of(config)
    if architecture is not None:
        options = dataclasses.replace(options, architecture=architecture)
    return layer_slots(options, config, num_experts=config.num_moe_experts)


def layer_submodules(config: TransformerConfig, slots: LayerSlots) -> TransformerLayerSubmodules:
    """Return one layer's specs: norm, mixer, residual, norm, channel mixer, residual."""
    backend = get_backend(config.transformer_impl)
    norm = norm_builder(config)
    has_channel = slots.channel != "none"
    return TransformerLayerSubmodules(
        input_layernorm=norm,
        self_attention=_mixer(config, slots, backend),
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=norm if has_channel else IdentityOp,
        mlp=_channel(config, slots, backend) if has_channel else IdentityOp,
        mlp_bda=get_bias_dropout_add if has_channel else _no_residual,
    )


def _mixer(
    config: TransformerConfig, slots: LayerSlots, backend: BackendSpecProvider
) -> ModuleSpec:
    options, mixer = options_of(config), MIXERS[slots.mixer]
    chosen = {"kind": mixer.plugin} if mixer.plugin else {}
    if mixer.routes:
        chosen = {"feature_router": feature_router_class(options.feature_router)}
    return load(mixer.spec)(
        config,
        backend,
        heads=slots.heads,
        sequence_length=_sequence_length(config),
        projection=ToeplitzProjection if options.toeplitz else SpatialProjection,
        options=options,
        **chosen,
    )


def _channel(config: TransformerConfig, slots: LayerSlots, backend: BackendSpecProvider) -> Any:
    if slots.channel == "token_moe":
        name = options_of(config).token_router
        if name == "none":
            return token_moe_builder(config, backend)
        return token_moe_builder(config, backend, router=token_router_class(name))
    if slots.channel in CHANNELS:
        return hosted_spec(
            config,
            backend,
            kind=CHANNELS[slots.channel],
            sequence_length=_sequence_length(config),
        )
    return partial(MLP.as_mlp_submodule, submodules=two_projections(backend))


def _no_residual(training: bool, fused: bool) -> Any:
    """Return the residual connection of an empty channel slot, which passes the residual through:
    adding the identity's output would double it."""
    return lambda output, residual, dropout: residual


def _sequence_length(config: TransformerConfig) -> int:
    """Return T from our config or, with a bare `--spec`, from Megatron's own arguments."""
    length = getattr(config, "spatial_length", None)
    if length is not None:
        return int(length)
    from megatron.training import get_args

    return int(get_args().seq_length)


def block_spec(
    config: SMLPTransformerConfig, *, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """Return the specs of this pipeline stage's layers and of the final norm, for GPTModel."""
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(
        layer_specs=[ModuleSpec(module=SlottedLayer)] * count, layer_norm=norm_builder(config)
    )


# For Megatron-LM's `--spec megatron_smlp.architectures NAME`, which looks NAME up in this module;
# our flags then keep their defaults.
globals().update(
    {name: ModuleSpec(module=SlottedLayer, params={"architecture": name}) for name in ARCHITECTURES}
)
