"""Dispatch of tokens to their experts with fewer operators and host syncs than Megatron's.

Where each token has one expert and none is dropped, dispatch is a permutation: N expert numbers are
sorted, where Megatron sorts a flag per token and expert; nothing is summed; and weights are never
sent, since a token's own rank can scale the expert's output. That is `TopOneDispatcher`, for any
expert parallel size; it waits for the device once, as all-to-all needs token counts on the host.

`OneRankDispatcher` is for several experts per token, or dropped choices, with all experts on one
rank: nothing is exchanged, and tokens are already in the order of the experts.

Letters: N tokens of this rank, n tokens that reached its experts, E experts, R expert parallel
ranks, L = E / R, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel import all_to_all, gather_from_sequence_parallel_region
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAlltoAllTokenDispatcher,
    MoETokenDispatcher,
)
from torch import Tensor

from megatron_smlp.layers.permuting import permuted


class TopOneDispatcher(MoETokenDispatcher):
    """See the top of the file. It passes no weights to the experts."""

    kept: tuple[Tensor, Tensor, Tensor] | None = None
    """The order of the tokens, its inverse, and their weights."""

    def __init__(self, experts: Any, **kwargs: Any) -> None:
        """experts: the layer's `Experts`, of layers/token_moe.py."""
        super().__init__(**kwargs)
        self.num_local_experts: int = experts.num_local_experts
        self.groups_on_device = experts.groups_on_device

    def dispatch_preprocess(
        self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, None]:
        """hidden_states: <float>[.., D]; routing_map: <bool>[N, E], one True per row; probs:
        <fp32>[N, E]. Returns the tokens <float>[N, D] in the order of their experts."""
        self.count(routing_map)
        experts = routing_map.view(torch.uint8).argmax(dim=1)
        weights = probs.gather(1, experts.unsqueeze(1))
        order = experts.argsort(stable=True)
        places = order.argsort()
        self.kept = order, places, weights
        self.hidden_shape = hidden_states.shape
        tokens = hidden_states.reshape(-1, self.hidden_shape[-1])
        return permuted(tokens, order, places, dim=0), None

    def count(self, routing_map: Tensor) -> None:
        """Count tokens per expert; the copy to the host overlaps with sorting the tokens."""
        counts = routing_map.sum(dim=0)
        self.table: Tensor | None = counts.unsqueeze(0)  # <int64>[R, E], counts of a rank
        if self.ep_size > 1:
            table = gather_from_sequence_parallel_region(counts, group=self.ep_group)
            self.table = table.view(self.ep_size, -1)
            self.table_on_host = self.table.to("cpu", non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record()

    def token_dispatch(self, hidden_states: Tensor, probs: None) -> tuple[Tensor, None]:
        """Send the tokens to the ranks of their experts; hidden_states: <float>[N, D] ->
        <float>[n, D], by rank, then by expert."""
        if self.ep_size == 1:
            return hidden_states, None
        self.copied.synchronize()
        table, local = self.table_on_host.tolist(), self.num_local_experts
        first = self.ep_rank * local
        own = table[self.ep_rank]
        self.sent = [sum(own[start : start + local]) for start in range(0, len(own), local)]
        self.received = [row[first : first + local] for row in table]
        sizes = [sum(row) for row in self.received]
        return all_to_all(self.ep_group, hidden_states, sizes, self.sent), None

    def dispatch_postprocess(
        self, hidden_states: Tensor, probs: None
    ) -> tuple[Tensor, Tensor, None]:
        """Return <float>[n, D], by expert, and counts <int64>[L], on the host if it needs them."""
        table, self.table = self.table, None
        assert table is not None
        if self.ep_size == 1:
            return hidden_states, table[0], None
        first, local = self.ep_rank * self.num_local_experts, self.num_local_experts
        if not self.groups_on_device(hidden_states):
            table = self.table_on_host
        return (
            _transposed(hidden_states, self.received),
            table[:, first : first + local].sum(dim=0),
            None,
        )

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """<float>[n, D], by expert -> the same by rank, then by expert."""
        if self.ep_size == 1:
            return hidden_states
        return _transposed(hidden_states, list(zip(*self.received, strict=True)))

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        if self.ep_size == 1:
            return hidden_states
        sizes = [sum(row) for row in self.received]
        output: Tensor = all_to_all(self.ep_group, hidden_states, self.sent, sizes)
        return output

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """Return w_e times the experts' outputs, back in the order of the tokens,
        <float>[.., D]."""
        assert self.kept is not None
        (order, places, weights), self.kept = self.kept, None
        output = permuted(hidden_states, places, order, dim=0) * weights
        return output.to(hidden_states.dtype).view(self.hidden_shape)


def _transposed(tokens: Tensor, sizes: Sequence[Sequence[int]]) -> Tensor:
    """tokens: <float>[n, D], a row-major matrix of groups of these sizes -> column-major."""
    if len(sizes) == 1 or len(sizes[0]) == 1:
        return tokens
    columns = len(sizes[0])
    groups = tokens.split([size for row in sizes for size in row])
    return torch.cat([group for column in range(columns) for group in groups[column::columns]])


class OneRankDispatcher(MoEAlltoAllTokenDispatcher):
    """Megatron's dispatcher without the second sort, and without its wait if no choice is dropped.

    If choices are dropped, the host does not know how many are sent, which is the size of a tensor:
    it waits for that number, as in Megatron's.
    """

    tokens_per_expert: Tensor | None

    def _maybe_dtoh_and_synchronize(
        self, point: str, tokens_per_expert: Tensor | None = None
    ) -> Tensor | None:
        if isinstance(self.num_out_tokens, int):
            return tokens_per_expert
        return super()._maybe_dtoh_and_synchronize(point, tokens_per_expert)

    def dispatch_postprocess(
        self, global_input_tokens: Tensor, global_probs: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        counts = self._maybe_dtoh_and_synchronize("before_finish", self.tokens_per_expert)
        self.tokens_per_expert = None
        return global_input_tokens, counts, global_probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


def replace_dispatcher(layer: MoELayer, pg_collection: Any) -> None:
    """Replace Megatron's dispatcher in a layer with our experts, where one of ours fits."""
    current, config = layer.token_dispatcher, layer.config
    if (
        type(current) is not MoEAlltoAllTokenDispatcher
        or current.tp_size > 1
        or current.drop_and_pad
        or current.shared_experts is not None
    ):
        return
    drops = config.moe_expert_capacity_factor is not None
    if config.moe_router_topk == 1 and not (drops or config.moe_router_padding_for_quantization):
        layer.token_dispatcher = TopOneDispatcher(
            layer.experts, config=config, pg_collection=pg_collection
        )
    elif current.ep_size == 1:
        layer.token_dispatcher = OneRankDispatcher(
            layer.num_local_experts,
            layer.local_expert_indices,
            config=config,
            pg_collection=pg_collection,
        )
