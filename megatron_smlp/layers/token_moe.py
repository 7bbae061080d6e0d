"""Token MoE (tMoE): Megatron-Core's MoELayer with FFN experts, in the `mlp` slot.

    y = sum over the chosen experts e of  w_e * f_e(h),     f_e(h) = GELU(h A_e) B_e,   h = LN(x)

The router decides e and w_e and plugs into MoELayer's router slot; dispatch, expert parallelism and
the experts themselves are Megatron's. Experts and routers have no bias, as in the equations: w_e
would scale an expert's bias too.
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
    submodules = MoESubmodules(
        experts=partial(_experts, backend.grouped_mlp_modules(config.moe_grouped_gemm)),
        router=partial(_router, router),
    )
    return partial(MoELayer, submodules=submodules)


def _experts(builder: Any, num_local_experts: int, config: TransformerConfig, **kwargs: Any) -> Any:
    return builder(num_local_experts, _without_bias(config), **kwargs)


def _router(builder: Any, *, config: TransformerConfig, **kwargs: Any) -> Any:
    return builder(config=_without_bias(config), **kwargs)


def _without_bias(config: TransformerConfig) -> TransformerConfig:
    copied = copy.copy(config)
    copied.add_bias_linear = False
    return copied
