"""Drop what Megatron keeps of routers between tests."""

from collections.abc import Iterator

import pytest
import torch
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler


@pytest.fixture(autouse=True)
def tracker() -> Iterator[None]:
    """An empty tracker of metrics, and the scale of a loss that counts once."""
    destroy_moe_metrics_tracker()
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))
    yield
    destroy_moe_metrics_tracker()
