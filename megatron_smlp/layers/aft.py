"""The attention-free Transformer's mixer (Zhai et al., arXiv 2105.14103), in Megatron's
`self_attention` slot. The LN and the residual around it are the slot's.

    q, k, v = x Wq, x Wk, x Wv                                                      x = LN(input)
    y_t = sigmoid(q_t) * sum over s <= t of exp(k_s + w_ts) v_s / sum over s <= t of exp(k_s + w_ts)
    out = y Wo                                                          Wq, Wk, Wv: D x F, Wo: F x D

AFT-full learns w, one T x T matrix a layer, as gMLP's M; AFT-simple is w = 0, a running average.

Differences from the source (docs/decisions/0069): w is a whole matrix, not a product of two thin
ones; w ~ U(-1e-3/T, 1e-3/T). Input positions are learned, as a Transformer's.

Tensor parallelism shards the features; w is the same on all ranks, and its gradient is summed over
them. Queries, keys and values are one projection, whose rows lie as those of Megatron's attention.

Letters: T sequence, B batch, D hidden, F width (heads times --kv-channels: D), tp tensor parallel
size; F' = F / tp.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_smlp.layers.projections import (
    check_heads,
    column_projection,
    row_projection,
    two_projections,
)
from megatron_smlp.layers.token_mixer import TokenMixer
from megatron_smlp.ops.aft_mix import aft_mix
from megatron_smlp.ops.running_sums import running_average


def aft_spec(
    config: TransformerConfig,
    backend: BackendSpecProvider,
    *,
    sequence_length: int,
    options: Any,
    **_: Any,
) -> ModuleSpec:
    """Return the spec of a layer's attention-free mixer."""
    return ModuleSpec(
        module=AttentionFree,
        params={"sequence_length": sequence_length, "simple": options.aft_kind == "simple"},
        submodules=two_projections(backend),
    )


def check_flags(args: Any) -> None:
    """Check how the features are cut, of Megatron's namespace.

    Raises:
        ValueError: see `check_heads`.
    """
    check_heads(
        args,
        "--num-attention-heads",
        args.num_attention_heads,
        width=args.hidden_size,
        width_flag="--hidden-size",
        mixer="AFT",
        splits_one=False,
    )


class PositionWeights(nn.Module):
    """w, <float>[T, T], the same on all ranks; zero above the diagonal, which is never read."""

    def __init__(self, length: int, *, dtype: torch.dtype, initialize: bool) -> None:
        super().__init__()
        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self.weight = nn.Parameter(torch.zeros(length, length, dtype=dtype, device=device))
        if initialize:
            bound = max(1e-3 / length, torch.finfo(dtype).tiny)
            drawn = torch.empty(length, length, device="cpu").uniform_(-bound, bound)
            self.weight.data.copy_(drawn.tril_())

    def forward(self) -> Tensor:
        """Return w; asked for by a call, so that a gather of parameters is waited for."""
        return self.weight


class AttentionFree(TokenMixer):
    """See the top of the file.

    Args:
        simple: whether w is 0.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        layer_number: int = 1,
        *,
        sequence_length: int,
        simple: bool,
        pg_collection: ProcessGroupCollection | None = None,
        **unused_attention_arguments: Any,
    ) -> None:
        super().__init__(config, layer_number, pg_collection)
        self.length = sequence_length
        assert config.kv_channels is not None
        self.group_width = config.kv_channels
        width = config.kv_channels * config.num_attention_heads
        self.linear_qkv = column_projection(
            submodules.linear_fc1, config, 3 * width, name="qkv", tp_group=self.tp_group
        )
        self.positions: PositionWeights | None = None
        if not simple:
            self.positions = PositionWeights(
                sequence_length,
                dtype=config.params_dtype,
                initialize=config.perform_initialization,
            )
        self.linear_proj = row_projection(
            submodules.linear_fc2, config, width, name="proj", tp_group=self.tp_group
        )

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **unused: Any
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states: <float>[T', B, D] (normed; [T'/tp, B, D] under sequence parallel).

        Returns:
            y Wo without its bias, the same shape and dtype; the bias: [D] or None.

        Raises:
            ValueError: T' > T.
        """
        qkv, _ = self.linear_qkv(hidden_states)
        groups = qkv.unflatten(-1, (-1, 3, self.group_width))
        queries, keys, values = (part.flatten(2).contiguous() for part in groups.unbind(-2))
        mixed = torch.sigmoid(queries) * self.mix(keys, values)
        return self.linear_proj(mixed)

    def mix(self, keys: Tensor, values: Tensor) -> Tensor:
        """keys, values: <float>[T', B, F'] -> the weighted averages, the same."""
        if len(keys) > self.length:
            raise ValueError(
                f"A sequence of {len(keys)} tokens is longer than --seq-length {self.length}: AFT "
                f"has no weights for positions from {self.length} on. Cut the sequence, or train "
                "with a longer --seq-length."
            )
        if self.positions is None:
            return running_average(keys, values)
        # Each rank mixes its own features with the same w: dw is a sum over the ranks.
        weight = tensor_parallel.copy_to_tensor_model_parallel_region(
            self.positions(), self.tp_group
        )
        return aft_mix(keys, values, weight[: len(keys), : len(keys)])
