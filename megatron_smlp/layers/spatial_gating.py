"""Causal spatial gating, the token mixer of gMLP (Liu et al., arXiv 2105.08050), in Megatron's
`self_attention` slot, which adds the LN and the residual around it.

    u  = GELU(x U)                 x = LN(input);  U: D x Z,  u = [u1 | u2], each [T, F], F = Z/2
    g  = M_k LN_k(u2_k) + b_k      per head k: its chunk of f = F/h features, M_k lower triangular
    g += attention(x)              aMLP only: layers/tiny_attention.py
    y  = (u1 * g) V                V: F x D

Init: M ~ U(-1e-3/T, 1e-3/T), as in g-mlp-pytorch (the paper: near zero), and b = 1: a block starts
as a plain FFN. Rows of M are absolute positions: a shorter sequence uses M[:t, :t] and b[:t], so
batches are padded on the right.

Tensor parallelism shards the features, never the tokens: whole heads where tp divides h. A single
head is split over the whole TP group; M is then replicated on its ranks, and M's gradient and the
statistics of LN are summed over them. The result does not depend on tp.

layers/toeplitz.py has an M with fewer parameters.

Letters: T sequence, B batch, D hidden, Z ffn_hidden_size, F = Z/2 gate width, h heads, f = F/h,
tp tensor parallel size; h', F' are one rank's share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_smlp.layers.norms import HeadLayerNorm
from megatron_smlp.layers.projections import (
    await_parameters,
    check_heads,
    column_projection,
    row_projection,
    two_projections,
)
from megatron_smlp.layers.token_mixer import MegatronTokenMixer
from megatron_smlp.ops.causal_mix import causal_mix
from megatron_smlp.ops.gated_mix import gated_mix, gates_by_kernels, gelu_gate


def gating_spec(
    config: TransformerConfig,
    backend: BackendSpecProvider,
    *,
    module: type | None = None,
    tiny_attention: Callable[..., nn.Module] | None = None,
    heads: int,
    sequence_length: int,
    projection: type,
    options: Any = None,
    **params: Any,
) -> ModuleSpec:
    """Return the spec of a layer's spatial gating.

    Args:
        module: SpatialGating or a subclass.
        tiny_attention: aMLP's, see SpatialGating.
        projection: the class that holds M and b: SpatialProjection or a subclass.
        params: further arguments of the module.
    """
    return ModuleSpec(
        module=module or SpatialGating,
        params={
            "num_heads": heads,
            "sequence_length": sequence_length,
            "projection": projection,
            "tiny_attention": tiny_attention,
            **params,
        },
        submodules=two_projections(backend),
    )


class SpatialProjection(nn.Module):
    """M and b of the heads on this rank: g = M v + b, along the tokens.

    Args:
        num_heads: h', heads on this rank.
        length: T, the longest sequence.
        first_head, total_heads: which slice of all heads is this rank's, so that the initial
            values do not depend on the tensor parallel size.
        bound: the largest initial |M[t, s]|; default: 1e-3 / T.
        bias: the initial b.
    """

    is_dense = True
    """Whether M has a separate weight for each pair of tokens."""

    def __init__(
        self,
        num_heads: int,
        *,
        length: int,
        dtype: torch.dtype,
        first_head: int = 0,
        total_heads: int | None = None,
        initialize: bool = True,
        bound: float | None = None,
        bias: float = 1.0,
    ) -> None:
        super().__init__()
        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self.length = length
        matrix, row = self._shapes(length)
        kind = {"dtype": dtype, "device": device}
        self.weight = nn.Parameter(torch.empty(num_heads, *matrix, **kind))
        self.bias = nn.Parameter(torch.full((num_heads, *row), bias, **kind))
        if initialize:
            self._draw(first_head, total_heads or num_heads, bound or 1e-3 / length)

    @classmethod
    def of_rank(
        cls, mixer: MegatronTokenMixer, heads: int, length: int, *, is_shared: bool, **init: Any
    ) -> SpatialProjection:
        """Build M and b of a rank's heads, or of all heads where every rank needs them all."""
        local = heads if is_shared else heads // mixer.tp_group.size()
        return cls(
            local,
            length=length,
            dtype=mixer.config.params_dtype,
            first_head=0 if is_shared else mixer.tp_group.rank() * local,
            total_heads=heads,
            initialize=mixer.config.perform_initialization,
            **init,
        )

    def _shapes(self, length: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of one head's M and b."""
        return (length, length), (length,)

    @torch.no_grad()
    def _draw(self, first_head: int, total_heads: int, bound: float) -> None:
        # Below fp16's smallest normal number there are only a few values to draw.
        bound = max(bound, torch.finfo(self.weight.dtype).tiny)
        for head in range(total_heads):
            # From the CPU generator, one head at a time: never all heads' matrices in memory.
            matrix = torch.empty(self.weight.shape[1:]).uniform_(-bound, bound)
            if first_head <= head < first_head + len(self.weight):
                self.weight[head - first_head].copy_(self._causal(matrix))

    def _causal(self, matrix: Tensor) -> Tensor:
        """Zero what is never read of one head's M."""
        return matrix.tril_()

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return M and b: [h', T, T] and [h', T].

        Get them by calling the module, as all of its users do: under --overlap-param-gather the
        parameters are still in flight from other ranks until Megatron's forward pre-hook has
        waited for them.
        """
        return self.weight, self.bias

    def mixed(self, values: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """values: <float>[T', B, F'] -> M v + b: the same, T' <= T; row t reads rows <= t.

        weight: [h', T, T] and bias: [h', T] are this module's own or stand in for them in autograd.

        Raises:
            ValueError: T' > T.
        """
        tokens, batch, _ = values.shape
        self.check_length(tokens)
        heads = len(weight)
        # [T', B, h', f] -> [h', T', B f]: one GEMM per head over all samples.
        columns = values.view(tokens, batch, heads, -1).permute(2, 0, 1, 3).flatten(2)
        mixed = self.mix(self.first(weight, tokens), columns)
        mixed.add_(bias[:, :tokens, None])  # in new memory that nothing else reads
        return mixed.view(heads, tokens, batch, -1).permute(1, 2, 0, 3).reshape(values.shape)

    def first(self, weight: Tensor, tokens: int) -> Tensor:
        """Return the part of the weights that a sequence of `tokens` needs."""
        return weight[:, :tokens, :tokens]

    def mix(self, weight: Tensor, columns: Tensor) -> Tensor:
        """Return M v, <float>[h, T', N]; weight: from `first`, of some heads; columns: as M v."""
        return causal_mix(weight, columns)

    def rows_from(self, weight: Tensor, first: int, tokens: int) -> Callable[..., Tensor]:
        """Return, for T' = tokens, a function (head, <float>[T', N]) -> rows of M v from `first`
        on, [.., N]."""
        rows = weight[:, first:tokens]
        # One slice and one `unbind`: the backward makes one tensor of that size, not one per head.
        before, triangles = rows[:, :, :first].unbind(), rows[:, :, first:tokens].unbind()

        def mix(head: int, columns: Tensor) -> Tensor:
            from_before = before[head].to(columns.dtype) @ columns[:first]
            return from_before + causal_mix(triangles[head][None], columns[None, first:])[0]

        return mix

    def check_length(self, tokens: int) -> None:
        """Raise ValueError if a sequence has more tokens than M has rows."""
        if tokens > self.length:
            raise ValueError(
                f"A sequence of {tokens} tokens is longer than --seq-length {self.length}: spatial "
                f"matrices have no rows for positions from {self.length} on. Cut the sequence, or "
                "train with a longer --seq-length."
            )


class SpatialGating(MegatronTokenMixer):
    """The inside of a gMLP block, a drop-in replacement for Megatron's SelfAttention.

    Args:
        num_heads: h. tp must divide it, or it must be 1.
        projection: the class that holds M and b.
        tiny_attention: aMLP: builds the head of x that adds to g; called with config, tp_group.

    Raises:
        ValueError: h does not divide F, tp does not fit h, or context parallelism is on.
    """

    has_halves = True
    splits_one = True
    """Whether a single head is split over all tensor parallel ranks."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        layer_number: int,
        *,
        num_heads: int,
        sequence_length: int,
        projection: type[SpatialProjection] = SpatialProjection,
        tiny_attention: Callable[..., nn.Module] | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **unused_attention_arguments: Any,
    ) -> None:
        super().__init__(config, layer_number, pg_collection)
        tp = self.tp_group.size()
        check_gate(config, "num_heads", num_heads, splits_one=self.splits_one)
        assert config.ffn_hidden_size is not None
        gate_width = config.ffn_hidden_size // 2
        self.head_is_split = num_heads == 1 and tp > 1
        self.local_heads = max(1, num_heads // tp)

        self.linear_fc1 = column_projection(
            submodules.linear_fc1,
            config,
            config.ffn_hidden_size,
            tp_group=self.tp_group,
            stride=2,  # [u1 | u2]: each half is sharded by itself
        )
        self.norm = HeadLayerNorm(
            gate_width // tp,
            num_heads=self.local_heads,
            eps=config.layernorm_epsilon,
            dtype=config.params_dtype,
            group=self.tp_group if self.head_is_split else None,
        )
        self.spatial = projection.of_rank(
            self, self._num_matrices(num_heads), sequence_length, is_shared=self.shares_spatial
        )
        self.linear_fc2 = row_projection(
            submodules.linear_fc2, config, gate_width, tp_group=self.tp_group
        )
        self.tiny_attention = (
            tiny_attention(config=config, tp_group=self.tp_group) if tiny_attention else None
        )
        # Megatron's gradient norm counts an unmarked parameter once per TP group.
        for module in (self.norm,) if self.shares_spatial else (self.norm, self.spatial):
            for parameter in module.parameters():
                set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)
        self.recompute_gate = (
            config.recompute_granularity == "selective" and "core_attn" in config.recompute_modules
        )

    @property
    def shares_spatial(self) -> bool:
        """Return whether every rank of the TP group holds all M and b."""
        return self.head_is_split

    def _num_matrices(self, num_heads: int) -> int:
        return num_heads

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        **unused: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states: <float>[T', B, D] (normed; [T'/tp, B, D] under sequence parallel);
        rotary_pos_emb: under --position-embedding-type rope, for aMLP's small head.

        Returns:
            y without the bias of V, in the input's shape and dtype; and that bias, [D] or None.
        """
        u, _ = self.linear_fc1(hidden_states)
        attended = None
        if self.tiny_attention is not None:
            attended = self.tiny_attention(hidden_states, rotary_pos_emb)
        if self.recompute_gate and self.training:
            gated = tensor_parallel.checkpoint(self.gate, False, u, attended)
        else:
            gated = self.gate(u, attended)
        return self.linear_fc2(gated)

    def gate(self, u: Tensor, attended: Tensor | None = None) -> Tensor:
        """u: <float>[T', B, 2 F'], before the GELU; attended: <float>[T', B, F'], added to g.

        Returns:
            u1 * g: <float>[T', B, F'].
        """
        if not self.gates_by_kernels(u):
            u1, u2 = self.activation(u).chunk(2, dim=-1)
            return self.gated(u1, u2, attended)
        weight, bias = self.first_parameters(len(u))
        if not self.head_is_split:
            await_parameters(self.norm)
            norm = (self.norm.weight, self.norm.bias, self.norm.eps)
            return gelu_gate(u, norm, weight, bias, attended)
        u1, u2 = u.chunk(2, dim=-1)  # LN's statistics are sums over the ranks
        values = self.norm(self.activation(u2))
        return gated_mix(u1, values, weight, bias, attended)

    def gates_by_kernels(self, u: Tensor) -> bool:
        """Return whether one operator computes the gate of u, <float>[T', B, 2 F']."""
        spatial = self.spatial
        return spatial.is_dense and gates_by_kernels(
            u, self.local_heads, self.activation, spatial.length
        )

    def gated(self, u1: Tensor, u2: Tensor, attended: Tensor | None) -> Tensor:
        """u1, u2, attended: <float>[T', B, F'], after the GELU -> u1 * g, part by part."""
        gates = self.spatial.mixed(self.norm(u2), *self.spatial_parameters())
        return u1 * (gates if attended is None else gates + attended)

    def first_parameters(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Return M and b for a sequence of `tokens`, as autograd should see them.

        Raises:
            ValueError: the sequence is too long.
        """
        self.spatial.check_length(tokens)
        weight, bias = self.spatial_parameters()
        return self.spatial.first(weight, tokens), bias[:, :tokens]

    def spatial_parameters(self) -> tuple[Tensor, Tensor]:
        """Return M and b as autograd should see them."""
        weight, bias = self.spatial()
        if self.shares_spatial:
            # Each rank mixes its own features with the same M, b: dM, db are sums over the ranks.
            weight = tensor_parallel.copy_to_tensor_model_parallel_region(weight, self.tp_group)
            bias = tensor_parallel.copy_to_tensor_model_parallel_region(bias, self.tp_group)
        return weight, bias


def check_flags(args: Any) -> None:
    """Check --spatial-heads, and a feature router's chunks, in Megatron's namespace.

    Raises:
        ValueError: see `check_heads`.
    """
    check_gate(args, "--spatial-heads", args.spatial_heads)
    if args.feature_router != "none":
        flag = "--num-feature-chunks" if args.num_feature_chunks else "--num-feature-experts"
        chunks = args.num_feature_chunks or args.num_feature_experts
        check_gate(args, flag, chunks, splits_one=False)  # a chunk has one router


def check_gate(args: Any, flag: str, num_heads: int, *, splits_one: bool = True) -> None:
    """Check that heads, gate width and layout fit, in Megatron's namespace or config.

    Raises:
        ValueError: see `check_heads`.
    """
    width = args.ffn_hidden_size / 2
    check_heads(
        args,
        flag,
        num_heads,
        width=width,
        width_name=f"the gate width {width:g} (--ffn-hidden-size {args.ffn_hidden_size} / 2)",
        width_flag="--ffn-hidden-size",
        mixer="spatial gating",
        splits_one=splits_one,
    )
