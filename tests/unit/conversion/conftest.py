"""Megatron's process groups around a test, which each of its conversions would make anew."""

from collections.abc import Iterator

import pytest

from megatron_smlp.platform.one_process import one_process


@pytest.fixture
def in_one_process() -> Iterator[None]:
    with one_process():
        yield
