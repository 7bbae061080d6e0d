"""The balance loss of Switch, GShard and partial prediction, and its weight next to the main loss.

    E sum_e f_e P_e,   f_e share of the choices that are e's, P_e mean of p_e; 1 where uniform

Megatron attaches it to a tensor and adds its gradient in the backward (MoEAuxLossAutoScaler).
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.utils import get_model_config
from torch import Tensor


def balance_loss(probabilities: Tensor, first: Tensor) -> Tensor:
    """Return E sum_e f_e P_e, or the part of it that n of the N tokens contribute.

    probabilities: <fp32>[n, E]; first: <int64>[N], the first choices of the whole group.
    """
    num_experts, count = probabilities.shape[1], max(1, len(first))
    # Not bincount, which makes the host wait for the number of bins.
    share = probabilities.new_zeros(num_experts)
    share.index_add_(0, first, torch.ones_like(first, dtype=share.dtype))
    return num_experts * (share / count * probabilities.sum(dim=0)).sum() / count


def scale_balance_losses(model: Any) -> None:
    """Scale balance losses like the main loss; Megatron does so only if there are token experts.

    Partial prediction has a balance loss without them.
    """
    config = get_model_config(model)
    scale = torch.ones(1, device=torch.cuda.current_device())
    if config.grad_scale_func is not None:
        scale = config.grad_scale_func(scale)
    if not config.calculate_per_token_loss:
        scale = scale / get_num_microbatches()
    MoEAuxLossAutoScaler.set_loss_scale(scale)
