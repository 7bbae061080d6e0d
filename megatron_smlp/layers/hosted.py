"""Hosts a plugin's mixer (megatron_smlp/plugins.py) in one of the two slots of Megatron's layer.

    out = mixer(x W_1, x W_2, ...) W                    x = LN(input);  W_i: D x m_i F,  W: F x D

The slot adds the LN in front and the residual. Tensor parallelism shards the F features of each
projection separately; a mixer sees its rank's shard, a `whole` mixer all features on every rank.

Letters: T sequence, B batch, D hidden, F features, tp tensor parallel size.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

from megatron.core import tensor_parallel
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_smlp.layers.projections import (
    check_heads,
    column_projection,
    row_projection,
    two_projections,
)
from megatron_smlp.layers.token_mixer import MegatronTokenMixer
from megatron_smlp.ops.causal_mix import causal_mix
from megatron_smlp.plugin_weights import alike_on_ranks, on_cpu, own_weights
from megatron_smlp.plugins import Mixer, mix, projections_of, values_in


def hosted_spec(
    config: TransformerConfig,
    backend: BackendSpecProvider,
    *,
    kind: type[Mixer],
    sequence_length: int,
    **_: Any,
) -> ModuleSpec:
    """Return the spec of a mixer of class `kind`; its options are attributes of `config`."""
    return ModuleSpec(
        module=HostedMixer,
        params={
            "kind": kind,
            "length": sequence_length,
            "values": values_in(kind, config),
        },
        submodules=two_projections(backend),
    )


def check_flags(args: Any, kind: type[Mixer]) -> None:
    """Check that the parallel layout fits F.

    Raises:
        ValueError: see `check_heads`.
    """
    if args.ffn_hidden_size is None:
        return  # Megatron's default, which follows from --hidden-size
    width = features_of(args, kind)
    check_heads(args, "one head", 1, width=width, width_flag="features", mixer=kind.__name__)


def features_of(sizes: Any, kind: type[Mixer]) -> int:
    """Return F; sizes: Megatron's namespace or config, with the plugin's options."""
    return kind.features(
        hidden_size=sizes.hidden_size,
        ffn_hidden_size=sizes.ffn_hidden_size,
        values=values_in(kind, sizes),
    )


def causal_product(weight: Tensor, values: Tensor) -> Tensor:
    """See plugins.Mixer; the columns of all samples go through one product."""
    columns = values.transpose(0, 1)
    return causal_mix(weight[None], columns.flatten(1)[None]).view_as(columns).transpose(0, 1)


class HostedMixer(MegatronTokenMixer):
    """See the top of the file.

    Args:
        length: T.
        values: the values of the plugin's options.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        layer_number: int = 1,
        *,
        kind: type[Mixer],
        length: int,
        values: Mapping[str, Any],
        pg_collection: ProcessGroupCollection | None = None,
        **unused_arguments: Any,
    ) -> None:
        super().__init__(config, layer_number, pg_collection)
        parts = self.tp_group.size()
        features = features_of(config, kind)
        project = partial(column_projection, submodules.linear_fc1, config, tp_group=self.tp_group)
        for name, outputs in projections_of(kind).items():
            setattr(self, name, project(outputs * features))
        self.whole = kind.whole and parts > 1
        width = features if kind.whole else features // parts
        self.mixer = on_cpu(lambda: kind(width=width, length=length, values=values))
        self.mixer.causal_product = causal_product
        own_weights(self.mixer, dtype=config.params_dtype, group=self.tp_group, whole=kind.whole)
        self.linear_out = row_projection(
            submodules.linear_fc2, config, features, tp_group=self.tp_group
        )

    def forward(
        self, hidden_states: Tensor, *unused: Any, **unused_names: Any
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states: <float>[T', B, D] (normed; [T'/tp, B, D] under sequence parallel).

        Returns:
            The mixer's output without the bias of W, in the input's shape and dtype; and that
            bias, [D] or None.
        """
        projected = [
            self._gathered(getattr(self, name)(hidden_states)[0]).transpose(0, 1)
            for name in projections_of(type(self.mixer))
        ]
        with alike_on_ranks(self.config, self) if self.whole else nullcontext():
            mixed = mix(self.mixer, projected).transpose(0, 1).contiguous()
        if self.whole:
            mixed = tensor_parallel.scatter_to_tensor_model_parallel_region(
                mixed, group=self.tp_group
            )
        return self.linear_out(mixed.to(hidden_states.dtype))

    def _gathered(self, projected: Tensor) -> Tensor:
        """[T', B, m F / tp] -> the same or, for a `whole` mixer, [T', B, m F]."""
        if not self.whole:
            return projected
        return tensor_parallel.gather_from_tensor_model_parallel_region(
            projected, group=self.tp_group
        )
