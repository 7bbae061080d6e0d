"""Token MoE (tMoE): Megatron-Core's MoELayer with FFN experts, in the `mlp` slot.

    y = sum over the chosen experts e of  w_e * f_e(h),     f_e(h) = GELU(h A_e) B_e,   h = LN(x)

The router decides e and w_e and plugs into MoELayer's router slot; dispatch, expert parallelism and
the experts themselves are Megatron's. Experts have no bias, as in the equation: a bias would also
be scaled by w_e.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

from megatron.core.models.backends import BackendSpecProvider
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig


def token_moe_builder(
    config: TransformerConfig, backend: BackendSpecProvider, *, router: Any = TopKRouter
) -> Any:
    """A builder for the `mlp` slot.

    Args:
        router: what fills MoELayer's router slot; called with config, pg_collection, is_mtp_layer.
    """
    experts = partial(_without_bias, backend.grouped_mlp_modules(config.moe_grouped_gemm))
    return partial(MoELayer, submodules=MoESubmodules(experts=experts, router=router))


def _without_bias(
    builder: Any, num_local_experts: int, config: TransformerConfig, **kwargs: Any
) -> Any:
    expert_config = copy.copy(config)
    expert_config.add_bias_linear = False
    return builder(num_local_experts, expert_config, **kwargs)
