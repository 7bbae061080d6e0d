"""Token MoE (tMoE): Megatron-Core's MoELayer with FFN experts, in the `mlp` slot.

    y = sum over the chosen experts e of  w_e * f_e(h)  + f(h),     f_e(h) = GELU(h A_e) B_e,
    h = LN(x),  f the shared expert (--moe-shared-expert-intermediate-size), if there is one

The router decides e and w_e, from h as in the sources of Switch and GShard, or from x as in that of
BASE (routers/base.py). It plugs into MoELayer's router slot; dispatch, expert parallelism and
the experts themselves are Megatron's. Experts and routers have no bias, as in the equations: w_e
would scale an expert's bias too.

Letters: n tokens that reached the experts of this rank, D hidden, Z moe_ffn_hidden_size.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional

from megatron_smlp.layers.one_rank_dispatcher import dispatch_on_one_rank

_LOGGER = logging.getLogger(__name__)


def token_moe_builder(
    config: TransformerConfig, backend: BackendSpecProvider, *, router: Any = TopKRouter
) -> Any:
    """Return a builder for the `mlp` slot.

    Args:
        router: what fills MoELayer's router slot, called with config, pg_collection, is_mtp_layer;
            default: Megatron's, as under a bare `--spec` in its own script.
    """
    submodules = MoESubmodules(
        experts=partial(_experts, backend.grouped_mlp_modules(config.moe_grouped_gemm)),
        router=partial(_router, router),
        shared_experts=partial(
            _shared_experts,
            MLPSubmodules(
                linear_fc1=backend.column_parallel_linear(),
                linear_fc2=backend.row_parallel_linear(),
            ),
        ),
    )
    return partial(_layer, submodules, getattr(router, "draws", False))


def _layer(
    submodules: MoESubmodules, draws: bool, *, config: TransformerConfig, **kwargs: Any
) -> MoELayer:
    if draws or _has_capacity(config):
        # A capacity of its own is how Megatron's dispatcher learns that not every token is sent
        # k times. Only its top-k router would drop by it.
        config = copy.copy(config)
        config.moe_expert_capacity_factor = float(config.num_moe_experts)
    kind = ResidualRoutedMoELayer if _routes_on_residual(config) else MoELayer
    layer = kind(config, submodules=submodules, **kwargs)
    if torch.cuda.is_available() and isinstance(layer.experts, Experts):
        dispatch_on_one_rank(layer, layer.config, **kwargs)
    return layer


def _routes_on_residual(config: TransformerConfig) -> bool:
    """Return whether the router reads x, and not h."""
    is_base = getattr(config, "token_router", "none") == "base"
    return is_base and getattr(config, "base_routing_input", "residual") == "residual"


class ResidualRoutedMoELayer(MoELayer):
    """The layer is called with x. Its router reads that; its experts read h, as ever.

    The norm stays where it is in all layers, and in their checkpoints: SlottedLayer lends it.
    """

    norm: Callable[[Tensor], Tensor]

    def preprocess(
        self, hidden_states: Tensor, probs: Tensor, routing_map: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Hand h to the dispatcher, after the routing; hidden_states: <float>[T or T / TP, B, D]"""
        answer: tuple[Tensor, Tensor] = super().preprocess(
            self.norm(hidden_states), probs, routing_map
        )
        return answer


def _has_capacity(config: TransformerConfig) -> bool:
    """Return whether the router drops what an expert has no slot for."""
    factors = ("moe_train_capacity_factor", "moe_eval_capacity_factor")
    return any(getattr(config, name, None) is not None for name in factors)


class Experts(SequentialMLP):
    """Megatron's experts with w_e on their outputs, all at once.

    Megatron multiplies each expert's hidden layer by w_e, in fp32. Without a bias that is the same,
    for Z / D times the elements, and it keeps both, before and after, for the backward.

    On a GPU all experts are two grouped GEMMs, which read on the device where each group ends;
    elsewhere, and where these cannot be used, they run one after another.
    """

    def forward(
        self, hidden_states: Tensor, tokens_per_expert: Tensor, weights: Tensor
    ) -> tuple[Tensor, None]:
        """hidden_states: <float>[n, D], sorted by expert; tokens_per_expert: <int>[experts of this
        rank], sum n, on either device; weights: <fp32>[n], w_e.

        Returns:
            w_e f_e(h): <float>[n, D] (a part of the sum, where experts are tensor parallel); and
            None in place of a bias.
        """
        compute = self.grouped if self._can_group(hidden_states) else self.one_by_one
        output = compute(hidden_states, tokens_per_expert)
        return (output * weights.unsqueeze(-1)).to(output.dtype), None

    def one_by_one(self, hidden_states: Tensor, tokens_per_expert: Tensor) -> Tensor:
        """f_e(h): <float>[n, D]; the slow twin of `grouped`."""
        groups = hidden_states.split(tokens_per_expert.tolist())
        outputs = [
            expert(group)[0] for expert, group in zip(self.local_experts, groups, strict=True)
        ]
        return torch.cat(outputs)

    def grouped(self, hidden_states: Tensor, tokens_per_expert: Tensor) -> Tensor:
        """f_e(h): <float>[n, D], as two grouped GEMMs."""
        counts = tokens_per_expert.to(hidden_states.device, non_blocking=True)
        ends = counts.cumsum(0, dtype=torch.int32)
        into = self._stacked("linear_fc1")
        hidden = functional.grouped_mm(hidden_states, into.mT, offs=ends)
        hidden = self.config.activation_func(hidden)
        return functional.grouped_mm(hidden, self._stacked("linear_fc2").mT, offs=ends)

    def _stacked(self, name: str) -> Tensor:
        """Return the weights of one linear layer of all experts: [experts, out, in]."""
        layers = [getattr(expert, name) for expert in self.local_experts]
        for layer in layers:
            # With --overlap-param-gather a layer's weight is still on its way from other ranks
            # until the hook before its call, which never comes here, has waited for it.
            for hook in layer._forward_pre_hooks.values():
                hook(layer, ())
        return torch.stack([layer.weight for layer in layers])

    def _can_group(self, hidden_states: Tensor) -> bool:
        return hidden_states.is_cuda and not self.cannot_group(hidden_states.dtype)

    def cannot_group(self, dtype: torch.dtype) -> str:
        """Return why not, or an empty text; each reason is once in the log."""
        weight = self.local_experts[0].linear_fc1.weight
        reason = ""
        if not hasattr(functional, "grouped_mm"):
            reason = f"torch {torch.__version__} has no grouped_mm"
        elif dtype != torch.bfloat16 or weight.dtype != dtype:
            reason = f"grouped GEMMs are for bfloat16, not {dtype} with weights in {weight.dtype}"
        elif weight.shape[0] % 8 or weight.shape[1] % 8:
            sizes = f"{weight.shape[1]} and {weight.shape[0]}"
            reason = f"grouped GEMMs need widths that 8 divides, not {sizes}"
        elif self.config.gated_linear_unit or self.config.use_te_activation_func:
            reason = "their activation is not one function of each element"
        if reason:
            _say_once(reason)
        return reason


@cache
def _say_once(reason: str) -> None:
    _LOGGER.warning("experts run one after another, and slower: %s.", reason)


def _experts(builder: Any, num_local_experts: int, config: TransformerConfig, **kwargs: Any) -> Any:
    # FP8 pads each expert's tokens, weights and all, which is Megatron's own affair.
    if builder.func is SequentialMLP and not (config.fp8 or config.fp4):
        builder = partial(Experts, **builder.keywords)
    return builder(num_local_experts, _without_bias(config), **kwargs)


def _router(builder: Any, *, config: TransformerConfig, **kwargs: Any) -> Any:
    return builder(config=_without_bias(config), **kwargs)


def _shared_experts(
    submodules: MLPSubmodules, *, config: TransformerConfig, **kwargs: Any
) -> SharedExpertMLP:
    return SharedExpertMLP(_without_bias(config), submodules=submodules, **kwargs)


def _without_bias(config: TransformerConfig) -> TransformerConfig:
    copied = copy.copy(config)
    copied.add_bias_linear = False
    return copied
