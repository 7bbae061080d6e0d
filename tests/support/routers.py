"""A single router, on tokens with known probabilities."""

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from support.in_process import layer_config
from torch import Tensor

from megatron_smlp.options import PLUGIN_OPTIONS
from megatron_smlp.systems import token_router_class

SIX = [[0.7, 0.3], [0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.8, 0.2], [0.4, 0.6]]
"""Four tokens want expert 0 (0, 1, 2, 4), two want expert 1."""
COEFFICIENT = 0.01


def probable(probabilities: list[list[float]]) -> Tensor:
    """Return tokens <float>[n, 1, E] whose scores, with W = 1, give these probabilities."""
    return torch.tensor(probabilities).log()[:, None]


def make_router(name: str, *, num_experts: int, **changes: Any) -> Any:
    """Make a single router with W = 1, so that a token of D = E numbers is its own scores."""
    values = {
        "token_router": name,
        "hidden_size": num_experts,
        "num_attention_heads": 1,
        "num_moe_experts": num_experts,
        "moe_router_topk": 2 if name == "gshard" else 1,
        "moe_router_pre_softmax": True,
        "moe_aux_loss_coeff": COEFFICIENT if name in ("switch", "gshard") else 0.0,
        "moe_token_drop_policy": "position",
        "add_bias_linear": False,
        "hash_vocab_size": 40,
    }
    config = layer_config(**(values | changes))
    for option, it in PLUGIN_OPTIONS.items():
        setattr(config, option, it.default)
    router = token_router_class(name)(
        config=config, pg_collection=ProcessGroupCollection.use_mpu_process_groups()
    )
    router.set_layer_number(1)
    if router.weight is not None:
        router.weight.data.copy_(torch.eye(num_experts))
    return router
