"""Scaled dot-product attention for machines without Transformer Engine.

    y = softmax(q k^T / sqrt(d) + causal mask) v                (Vaswani et al., arXiv 1706.03762)

Megatron's own local core materializes all T x T scores; ops/causal_attention.py is faster.
Letters: T tokens, B batch, n heads on this rank, d head width, g key/value groups on this rank.
"""

from __future__ import annotations

import contextlib
from typing import Any

from megatron.core.models.backends import BackendSpecProvider
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_smlp.layers.norms import norm_builder
from megatron_smlp.ops.causal_attention import attend


def attention_spec(config: TransformerConfig, backend: BackendSpecProvider, **_: Any) -> ModuleSpec:
    """Return Megatron's SelfAttention spec; without Transformer Engine, it uses our core."""
    local = config.transformer_impl == "local"
    norm = norm_builder(config) if config.qk_layernorm else None
    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.column_parallel_linear(),
            core_attention=CausalCoreAttention if local else backend.core_attention(),
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=norm,
            k_layernorm=norm,
        ),
    )


class CausalCoreAttention(DotProductAttention):
    """Megatron's DotProductAttention, computed by `attend`; takes the same arguments.

    Raises:
        ValueError: a setting is not supported (window, sink softmax, packed sequences).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.config.window_size is not None or self.config.softmax_type != "vanilla":
            raise ValueError(
                "--window-size and --softmax-type other than vanilla need Transformer Engine, "
                "which is not in use (--transformer-impl local). Omit them."
            )
        if self.config.apply_query_key_layer_scaling:
            # To stay in fp16's range, Megatron divides queries by the layer number, and multiplies
            # the scores by it again in its own softmax.
            self.softmax_scale *= max(1, self.layer_number)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """query: <float>[T, B, n, d]; key, value: <float>[T, B, g, d] -> <float>[T, B, n d].

        The mask is causal; under --reset-attention-mask it is <bool>[B, 1, T, T], True where a
        position is masked out.
        """
        mask_type = attn_mask_type or self.attn_mask_type
        if packed_seq_params is not None or attention_bias is not None:
            raise ValueError("Packed sequences and attention bias need Transformer Engine.")
        if mask_type is not AttnMaskType.causal:
            raise ValueError(f"Only the causal mask is supported here, not {mask_type}.")
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        dropout = self.attention_dropout.p if self.training else 0.0
        # Ranks hold different heads and draw apart; with sequence parallelism the whole layer does.
        forks = dropout and self.config.tensor_model_parallel_size > 1
        apart = forks and not self.config.sequence_parallel
        with get_cuda_rng_tracker().fork() if apart else contextlib.nullcontext():
            mixed = attend(
                q,
                k,
                v,
                scale=self.softmax_scale,
                dropout=dropout,
                training=self.training,
                allowed=None if attention_mask is None else ~attention_mask,
            )
        return mixed.permute(2, 0, 1, 3).flatten(2)
