"""Dispatch of tokens to experts that are all on this rank, for which the host need not wait.

Megatron's dispatcher brings the numbers of tokens of each expert to the host: all-to-all needs them
as sizes, and experts that run one after another, too. With one rank nothing is exchanged, tokens
already lie in the order of the experts, and a grouped GEMM reads the numbers on the device.
"""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor


class OneRankDispatcher(MoEAlltoAllTokenDispatcher):
    """Megatron's, without its second sorting, and without its wait where no choice is dropped.

    Dropped choices make the number of sent ones, the size of a tensor, unknown to the host: it
    waits for that, as Megatron's does.
    """

    tokens_per_expert: Tensor | None

    def _maybe_dtoh_and_synchronize(
        self, point: str, tokens_per_expert: Tensor | None = None
    ) -> Tensor | None:
        if isinstance(self.num_out_tokens, int):
            return tokens_per_expert
        answer: Tensor | None = super()._maybe_dtoh_and_synchronize(point, tokens_per_expert)
        return answer

    def dispatch_postprocess(
        self, global_input_tokens: Tensor, global_probs: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        counts = self._maybe_dtoh_and_synchronize("before_finish", self.tokens_per_expert)
        self.tokens_per_expert = None
        return global_input_tokens, counts, global_probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


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
