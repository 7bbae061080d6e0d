"""Feature MoE (sMoE): routes chunks of the hidden dimension, not tokens, to spatial experts.

    g_i = s_i * (M_e(i) LN(u2_i)) + b_e(i)         i = 0..C-1 chunks of F/C features, E experts

Deterministic (Yu et al., arXiv 2203.06850, section 3, where C = E):

    e(i) = i mod E        s_i = 1

The choice ignores the tokens: spatial gating whose heads are the experts does it without a router.
Partial: routers/prefix.py gives e(i) and s_i for the rows t >= P of a sample; rows t < P, and thus
all of a sequence shorter than P tokens, are routed deterministically.

Parameters grow by E T T per layer, FLOPs do not grow with E. Tensor parallelism shards the chunks;
any chunk may choose any expert, so every rank holds all M and b, and their gradients are summed
over the ranks.

Letters: T tokens of this call, B batch, C' chunks of this rank, f = F/C features of a chunk,
E experts, P prefix length, R = B C'.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional

from megatron_smlp.layers.permuting import permuted
from megatron_smlp.layers.projections import await_parameters
from megatron_smlp.layers.spatial_gating import SpatialGating, gating_spec
from megatron_smlp.ops.gated_mix import Routing, gated_mix
from megatron_smlp.ops.gelu_norm import gelu_norm
from megatron_smlp.routers.prefix import Choice, PrefixRouter


def feature_moe_spec(
    *args: Any, options: Any, heads: int, feature_router: Any, **kwargs: Any
) -> ModuleSpec:
    """Return the spec of a layer with `heads` spatial experts, routed as --feature-router says.

    Args:
        feature_router: the layer's router class; None: chunk i goes to expert i, as the heads of
            plain spatial gating do.
    """
    if feature_router is None:
        return gating_spec(*args, heads=heads, **kwargs)
    return gating_spec(
        *args,
        module=PartialFeatureMoE,
        heads=options.num_chunks,
        num_experts=heads,
        prefix_length=options.prefix_length(kwargs["sequence_length"]),
        router=feature_router,
        loss_coeff=options.feature_aux_loss_coeff,
        **kwargs,
    )


class PartialFeatureMoE(SpatialGating):
    """See the top of the file.

    Args:
        num_heads: C; tp must divide it.
        num_experts: E.
        prefix_length: P, tokens.
        router: PrefixRouter, or a class with the same interface.
        loss_coeff: weight of the balance loss.

    Raises:
        ValueError: C does not divide F, or tp does not divide C.
    """

    splits_one = False  # each rank would route by its own part of the features

    def __init__(
        self,
        config: TransformerConfig,
        *args: Any,
        num_experts: int,
        prefix_length: int,
        router: type[PrefixRouter],
        loss_coeff: float,
        **kwargs: Any,
    ) -> None:
        self.num_experts, self.prefix_length = num_experts, prefix_length
        super().__init__(config, *args, **kwargs)
        self.first_chunk = self.tp_group.rank() * self.local_heads
        self.router = router(
            config,
            layer_number=self.layer_number,
            prefix_length=prefix_length,
            num_experts=num_experts,
            loss_coeff=loss_coeff,
            tp_group=self.tp_group,
        )

    @property
    def shares_spatial(self) -> bool:
        return True

    def _num_matrices(self, num_heads: int) -> int:
        return self.num_experts

    def gate(self, u: Tensor, attended: Tensor | None = None) -> Tensor:
        """See the base class; there is no attention to add here."""
        if not self.gates_by_kernels(u):
            return super().gate(u, attended)
        u1, u2 = u.chunk(2, dim=-1)
        await_parameters(self.norm)
        values, means = gelu_norm(
            u2, self.norm.weight, self.norm.bias, self.local_heads, self.norm.eps
        )
        weight, bias = self.first_parameters(len(u))
        return gated_mix(u1, values, weight, bias, routing=self._routing(means))

    def _routing(self, means: Tensor) -> Routing:
        """Route by the means of the chunks, <fp32>[T, B, C']."""
        tokens, batch, _ = means.shape
        experts = self._deterministic(means.device).expand(batch, -1)
        choice = Choice(experts, torch.ones(experts.shape, device=means.device))
        if tokens > self.prefix_length:
            choice = self.router(means)
        return Routing(
            torch.stack([experts, choice.experts]).int(),
            choice.scale,
            min(self.prefix_length, tokens),
        )

    def _deterministic(self, device: torch.device) -> Tensor:
        """Return the experts of this rank's chunks for the rows of the prefix: <int64>[C']."""
        chunks = self.first_chunk + torch.arange(self.local_heads, device=device)
        return chunks % self.num_experts

    def gated(self, u1: Tensor, u2: Tensor, attended: Tensor | None) -> Tensor:
        """See the base class; there is no attention to add here."""
        return u1 * self.mix(u2)

    def mix(self, u2: Tensor) -> Tensor:
        """u2: <float>[T, B, F'] -> g: <float>[T, B, F']."""
        tokens = len(u2)
        self.spatial.check_length(tokens)
        chunks = self.norm(u2).unflatten(-1, (self.local_heads, -1))
        weight, bias = self.spatial_parameters()
        bias = bias[:, :tokens]
        mixed = self._prefix_rows(chunks[: self.prefix_length], weight, bias)
        if tokens > self.prefix_length:
            # After its LayerNorm, a chunk's mean would at first be the same for every input.
            means = u2.unflatten(-1, (self.local_heads, -1)).mean(dim=-1, dtype=torch.float32)
            choice = self.router(means)
            mixed = torch.cat([mixed, self._routed_rows(chunks, weight, bias, choice)])
        return mixed.flatten(2)

    def _prefix_rows(self, chunks: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """chunks: <float>[p, B, C', f], p = min(P, T); weight: every M; bias: [E, T] or [E, 1].

        Returns:
            g of the rows t < P, <float>[p, B, C', f].
        """
        rows, batch = chunks.shape[:2]
        experts = self._deterministic(weight.device)
        weight = self.spatial.first(weight, rows)[experts]
        bias = bias[:, :rows][experts]
        columns = chunks.permute(2, 0, 1, 3).flatten(2)  # [C', p, B f]: one GEMM per chunk
        mixed = self.spatial.mix(weight, columns) + bias[..., None]
        return mixed.unflatten(-1, (batch, -1)).permute(1, 2, 0, 3)

    def _routed_rows(self, chunks: Tensor, weight: Tensor, bias: Tensor, choice: Choice) -> Tensor:
        """chunks: <float>[T, B, C', f] -> g of the rows t >= P, <float>[T - P, B, C', f].

        The R pairs of sample and chunk are sorted by expert, so that each expert takes one product.
        """
        experts, order = choice.experts.flatten().sort(stable=True)
        place = order.argsort()
        counts = functional.one_hot(experts, self.num_experts).sum(dim=0).tolist()
        pairs = permuted(chunks.flatten(1, 2), order, place, dim=1)  # [T, R, f]
        first = self.prefix_length
        scale = choice.scale.flatten()[order].to(pairs.dtype)
        rows = len(chunks) - first
        mix = self.spatial.rows_from(weight, first, len(chunks))
        mixed = _mix_groups(pairs, counts, mix) * scale[:, None]
        # The last rows' biases; of a Toeplitz matrix, the slice keeps its one bias for all rows.
        mixed = mixed + bias[:, -rows:][experts].T[..., None]
        answer = permuted(mixed, place, order, dim=1)
        return answer.view(len(mixed), *chunks.shape[1:])


def _mix_groups(pairs: Tensor, counts: list[int], mix: Callable[..., Tensor]) -> Tensor:
    """Mix some rows of the pairs, each group of adjacent pairs by its own expert.

    pairs: <float>[T, R, f]; counts: pairs per expert; mix: see SpatialProjection.rows_from.
    Returns <float>[rows, R, f].
    """
    tokens, _, width = pairs.shape
    mixed = []
    for expert, group in enumerate(pairs.split(counts, dim=1)):
        if group.shape[1]:
            columns = mix(expert, group.reshape(tokens, -1))
            mixed.append(columns.unflatten(-1, (-1, width)))
    return torch.cat(mixed, dim=1)
