"""Dispatch of tokens to experts that are all on this rank, for which the host need not wait.

Megatron's dispatcher brings the numbers of tokens of each expert to the host: all-to-all needs them
as sizes, and experts that run one after another, too. With one rank nothing is exchanged, tokens
already lie in the order of the experts, and a grouped GEMM reads the numbers on the device.

Where each token has one expert, and none is dropped, they are a permutation: the experts' numbers
are sorted, where Megatron sorts a flag for each token and expert, and nothing is added up.
"""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor

from megatron_smlp.layers.permuting import permuted


class OneRankDispatcher(MoEAlltoAllTokenDispatcher):
    """Megatron's, without its second sorting, and without its wait where no choice is dropped.

    Dropped choices make the number of sent ones, the size of a tensor, unknown to the host: it
    waits for that, as Megatron's does.
    """

    tokens_per_expert: Tensor | None
    order: Tensor | None = None
    """Of the tokens, where they are a permutation."""
    places: Tensor | None = None
    """Its inverse."""

    def dispatch_preprocess(
        self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """hidden_states: <float>[.., D]; routing_map: <bool>[N, E]; probs: <fp32>[N, E].

        Returns the tokens <float>[n, D] and weights <fp32>[n] in the order of their experts.
        """
        config = self.config
        drops = config.moe_expert_capacity_factor is not None
        if config.moe_router_topk > 1 or drops or config.moe_router_padding_for_quantization:
            self.order = None
            answer: tuple[Tensor, Tensor]
            answer = super().dispatch_preprocess(hidden_states, routing_map, probs)
            return answer
        self.hidden_shape = hidden_states.shape
        self.tokens_per_expert = self.preprocess(routing_map)
        experts = routing_map.byte().argmax(dim=1)
        self.order = experts.argsort(stable=True)
        self.places = self.order.argsort()
        tokens = hidden_states.reshape(-1, self.hidden_shape[-1])
        weights = probs.gather(1, experts.unsqueeze(1)).squeeze(1)
        return (
            permuted(tokens, self.order, self.places, dim=0),
            permuted(weights, self.order, self.places, dim=0),
        )

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

    def combine_postprocess(self, permutated_local_input_tokens: Tensor) -> Tensor:
        """Return the outputs of the experts at the places of their tokens, <float>[.., D]."""
        if self.order is None or self.places is None:
            return super().combine_postprocess(permutated_local_input_tokens)
        output = permuted(permutated_local_input_tokens, self.places, self.order, dim=0)
        self.order = self.places = None
        return output.view(self.hidden_shape)


def dispatch_on_one_rank(layer: MoELayer, config: Any, **kwargs: Any) -> None:
    """Give a layer this dispatcher where it is for it; kwargs: as the layer was built with."""
    current = layer.token_dispatcher
    if (
        type(current) is MoEAlltoAllTokenDispatcher
        and current.ep_size == current.tp_size == 1
        and not current.drop_and_pad
        and layer.shared_experts is None
    ):
        layer.token_dispatcher = OneRankDispatcher(
            layer.num_local_experts,
            layer.local_expert_indices,
            config=config,
            pg_collection=kwargs["pg_collection"],
        )
