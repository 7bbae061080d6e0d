"""Keep Megatron's process groups for a whole test; otherwise each conversion would set them up."""

from collections.abc import Iterator

import pytest

from megatron_smlp.platform.one_process import one_process


@pytest.fixture
def in_one_process() -> Iterator[None]:
    with one_process():
        yield
