"""Drop what Megatron keeps of routers between tests."""

from collections.abc import Iterator

import pytest
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker


@pytest.fixture(autouse=True)
def tracker() -> Iterator[None]:
    """An empty tracker of metrics."""
    destroy_moe_metrics_tracker()
    yield
    destroy_moe_metrics_tracker()
