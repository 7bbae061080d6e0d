"""Count the bytes that autograd keeps of one layer's forward pass."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import nn


def kept_bytes(layer: nn.Module, hidden: torch.Tensor) -> int:
    """Bytes of all storages that are saved for the backward pass, the layer's weights aside.

    Counted as on a GPU, for which tools/estimate.py is: attention is SDPA there, and not in blocks,
    which keep their weights.

    layer: a SlottedLayer, in training. hidden: <float>[T, B, D].
    """
    from megatron_smlp.ops import causal_attention

    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)  # an address is only unique while its tensor lives
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        mock.patch.object(causal_attention, "LONGEST", 0),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        layer(hidden.requires_grad_(), attention_mask=None)
    return sum(kept.values())


def build_layer(*, batch: int, length: int, **config: Any) -> nn.Module:
    """One layer of the given config, its HASH router, if any, told `batch` samples of tokens."""
    from support.in_process import layer_config

    from megatron_smlp.architectures import SlottedLayer
    from megatron_smlp.routers.hash import HashRouter

    layer = SlottedLayer(layer_config(spatial_length=length, **config))
    for module in layer.modules():
        if isinstance(module, HashRouter):
            module.token_ids.hand(torch.randint(40, (batch, length)))
    return layer
