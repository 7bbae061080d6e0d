"""The small attention head of aMLP (Liu et al., arXiv 2105.08050), which adds to the gate.

    q, k, v = x W_qkv        one head of width w, x = LN(input), as the gate's U reads it; with
                             --position-embedding-type rope (not in the paper) q and k are rotated
    a = softmax(q k^T / sqrt(w) + causal mask) v W_o            W_o: w x F;  g := g + a

One head cannot be split over the tensor parallel ranks, and is too small to be worth it: every rank
computes all of it, with the same W_qkv, and projects it to its own share of the F gate features.

Letters: T sequence, B batch, D hidden, w tiny_attention_width, F gate width; F' = F / tp.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_smlp.layers import spatial_gating
from megatron_smlp.layers.spatial_gating import gating_spec
from megatron_smlp.ops.causal_attention import attend
from megatron_smlp.plugin_weights import alike_on_ranks


def gating_and_attention_spec(
    config: TransformerConfig, *args: Any, options: Any, **kwargs: Any
) -> ModuleSpec:
    """Return the spec of spatial gating with this head added to the gate."""
    assert config.ffn_hidden_size is not None
    head = partial(
        TinyAttention, width=options.tiny_attention_width, out_features=config.ffn_hidden_size // 2
    )
    return gating_spec(config, *args, tiny_attention=head, **kwargs)


class TinyAttention(nn.Module):
    """See the top of the file.

    Args:
        width: w.
        out_features: F, over all ranks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        width: int,
        out_features: int,
        tp_group: torch.distributed.ProcessGroup,
    ) -> None:
        super().__init__()
        self.config, self.tp_group = config, tp_group
        local = out_features // tp_group.size()
        first = local * tp_group.rank()
        self.linear_qkv = self._linear(config.hidden_size, 3 * width)
        self.linear_proj = self._linear(width, out_features, rows=slice(first, first + local))
        for parameter in self.linear_proj.parameters():
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)

    def _linear(self, inputs: int, outputs: int, *, rows: slice | None = None) -> nn.Linear:
        """Build rows of a projection; their values do not depend on the tensor parallel size."""
        config = self.config
        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        rows = rows or slice(0, outputs)
        bias, dtype = config.add_bias_linear, config.params_dtype
        # With all rows, since it draws their values: fewer draws would change all later numbers.
        linear = nn.Linear(inputs, outputs, bias=bias, dtype=dtype, device=device)
        if config.perform_initialization:
            # From the CPU generator, which is the same on all ranks of the group.
            whole = torch.empty(outputs, inputs, device="cpu")
            config.init_method(whole)
            linear.weight.data.copy_(whole)
        if bias:
            nn.init.zeros_(linear.bias)
            linear.bias = nn.Parameter(linear.bias.data[rows].clone())
        linear.weight = nn.Parameter(linear.weight.data[rows].clone())
        linear.out_features = rows.stop - rows.start
        return linear

    def forward(self, hidden_states: Tensor, angles: Tensor | None = None) -> Tensor:
        """hidden_states: <float>[T, B, D] ([T / tp, B, D] under sequence parallel); angles:
        Megatron's rotary_pos_emb, <fp32>[T, 1, 1, w], by which q and k are rotated.

        Returns:
            What is added to the gate of this rank, <float>[T, B, F'].
        """
        if self.config.sequence_parallel:
            # All ranks then compute the same, so each keeps its own tokens' part of the gradient.
            hidden_states = tensor_parallel.gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=self.tp_group
            )
        # Each rank has different gate features, so the head's gradient is a sum over the ranks. Sum
        # it here, after attention's backward, which on a GPU adds in no fixed order: otherwise the
        # ranks would update their copies of the head slightly differently and drift apart.
        qkv = tensor_parallel.copy_to_tensor_model_parallel_region(
            self.linear_qkv(hidden_states), self.tp_group
        )
        q, k, v = qkv.unsqueeze(2).chunk(3, dim=-1)  # [T, B, 1, w]
        if angles is not None:
            q, k = (apply_rotary_pos_emb(x, angles, self.config) for x in (q, k))
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        dropout = self.config.attention_dropout if self.training else 0.0
        # All ranks hold the same head.
        with alike_on_ranks(self.config, self) if dropout else contextlib.nullcontext():
            attended = attend(q, k, v, dropout=dropout, training=self.training)
        return self.linear_proj(attended.squeeze(1).transpose(0, 1))


def check_flags(args: Any) -> None:
    """Check the gate and, with rotary positions, the head's width in Megatron's namespace.

    Raises:
        ValueError: see the messages and `spatial_gating.check_flags`.
    """
    spatial_gating.check_flags(args)
    if args.position_embedding_type != "rope":
        return
    width = args.tiny_attention_width
    if width % 2:
        raise ValueError(
            f"--tiny-attention-width {width} must be even with --position-embedding-type rope, "
            "which rotates pairs of features."
        )
    if args.kv_channels != width:
        raise ValueError(
            f"--kv-channels {args.kv_channels} with --position-embedding-type rope must equal "
            f"--tiny-attention-width {width}, the width of the rotated head: omit it."
        )
