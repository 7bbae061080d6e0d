"""The masked mixer, a causal MLP-Mixer (Tolstikhin et al., arXiv 2105.01601; Badger, arXiv
2409.01482), in Megatron's `self_attention` slot, which adds the LN and the residual around it.

    y = tril(M_k) x_k + c_k                          x = LN(input);  per head k: f = D/h features
    y = tril(M2_k) GELU(tril(M_k) x_k + c_k) + c2_k  with --mixer-expansion, MLP-Mixer's two layers

It only mixes tokens, by position; the MLP in the other slot mixes features. With --toeplitz (Badger
and Roland, arXiv 2605.06683) a matrix has one weight per distance: layers/toeplitz.py.

Differences from the sources (docs/decisions/0068): the hidden layer of the token MLP has T units,
one per position, as causality requires; and there are heads. Init: the matrix that writes to the
residual is drawn as gMLP's, U(-1e-3/T, 1e-3/T); with expansion M ~ U(-sqrt(3/T), sqrt(3/T)), whose
last row preserves the variance; c = 0.

Tensor parallelism shards the features, never the tokens: the slot's tensor is resharded by features
and back. The M of a single head is replicated on all ranks, and its gradient is summed over them.

Letters: T sequence, B batch, D hidden, h heads, f = D/h, tp tensor parallel size; h', D' are
one rank's share.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    all_to_all_hp2sp,
    all_to_all_sp2hp,
    gather_from_tensor_model_parallel_region,
    scatter_to_tensor_model_parallel_region,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_smlp.layers.projections import check_heads
from megatron_smlp.layers.spatial_gating import SpatialProjection
from megatron_smlp.layers.token_mixer import MegatronTokenMixer


def masked_mixer_spec(
    config: TransformerConfig,
    backend: Any,
    *,
    heads: int,
    sequence_length: int,
    projection: type[SpatialProjection],
    options: Any,
) -> ModuleSpec:
    """Return the spec of a layer's masked mixer."""
    return ModuleSpec(
        module=MaskedMixer,
        params={
            "num_heads": heads,
            "sequence_length": sequence_length,
            "projection": projection,
            "expansion": options.mixer_expansion,
        },
    )


def check_flags(args: Any) -> None:
    """Check --spatial-heads of Megatron's namespace.

    Raises:
        ValueError: see `check_heads`.
    """
    check_heads(
        args,
        "--spatial-heads",
        args.spatial_heads,
        width=args.hidden_size,
        width_flag="--hidden-size",
        mixer="a masked mixer",
    )


class MaskedMixer(MegatronTokenMixer):
    """See the top of the file.

    Args:
        num_heads: h. tp must divide it, or it must be 1.
        projection: the class that holds M and c.
        expansion: whether there are two matrices with a GELU between them.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int = 1,
        *,
        num_heads: int,
        sequence_length: int,
        projection: type[SpatialProjection] = SpatialProjection,
        expansion: bool = False,
        pg_collection: ProcessGroupCollection | None = None,
        **unused_attention_arguments: Any,
    ) -> None:
        super().__init__(config, layer_number, pg_collection)
        self.head_is_split = num_heads == 1 and self.tp_group.size() > 1
        wide = math.sqrt(3 / sequence_length) if expansion else None
        build = partial(
            projection.of_rank,
            *(self, num_heads, sequence_length),
            is_shared=self.head_is_split,
            bias=0.0,
        )
        self.spatial = build(bound=wide)
        self.spatial_out: SpatialProjection | None = None
        if expansion:
            self.spatial_out = build()
        if not self.head_is_split:
            for parameter in self.parameters():
                set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **unused: Any
    ) -> tuple[Tensor, None]:
        """hidden_states: <float>[T', B, D] (normed; [T'/tp, B, D] under sequence parallel).

        Returns:
            y, in the input's shape and dtype; and None in place of a bias.
        """
        mixed = self.mix(self.spatial, self._to_features(hidden_states))
        if self.spatial_out is not None:
            mixed = self.mix(self.spatial_out, self.activation(mixed))
        return self._to_tokens(mixed, hidden_states), None

    def mix(self, spatial: SpatialProjection, values: Tensor) -> Tensor:
        """values: <float>[T', B, D'] -> M v + c, the same shape."""
        weight, bias = spatial()
        if self.head_is_split:
            # Each rank mixes its own features with the same M, c: dM, dc are sums over the ranks.
            weight = tensor_parallel.copy_to_tensor_model_parallel_region(weight, self.tp_group)
            bias = tensor_parallel.copy_to_tensor_model_parallel_region(bias, self.tp_group)
        return spatial.mixed(values, weight, bias)

    def _to_features(self, hidden_states: Tensor) -> Tensor:
        """Reshard the slot's tensor into all tokens of this rank's features, <float>[T', B, D']."""
        if self.tp_group.size() == 1:
            return hidden_states
        if not self.config.sequence_parallel:
            scattered: Tensor = scatter_to_tensor_model_parallel_region(
                hidden_states, self.tp_group
            )
            return scattered.contiguous()
        batch = hidden_states.shape[1]
        exchanged: Tensor = all_to_all_sp2hp(hidden_states, self.tp_group)
        return exchanged.unflatten(0, (-1, batch)).contiguous()

    def _to_tokens(self, mixed: Tensor, like: Tensor) -> Tensor:
        """Undo `_to_features`, back to the shape of the slot's tensor."""
        if self.tp_group.size() == 1:
            return mixed
        if self.config.sequence_parallel:
            exchanged: Tensor = all_to_all_hp2sp(mixed, self.tp_group)
            return exchanged.view(like.shape)
        return gather_from_tensor_model_parallel_region(mixed, self.tp_group)
