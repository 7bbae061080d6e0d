"""Drop what Megatron keeps about routers between tests."""

from collections.abc import Iterator

import pytest
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker


@pytest.fixture(autouse=True)
def tracker() -> Iterator[None]:
    """Start and end each test with an empty metrics tracker."""
    destroy_moe_metrics_tracker()
    yield
    destroy_moe_metrics_tracker()
