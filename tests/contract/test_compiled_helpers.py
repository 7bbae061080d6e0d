"""Megatron's index builder comes compiled; nothing is compiled where it is there, on any device."""

import pytest
from megatron.core.datasets import utils

from megatron_smlp.megatron_patches import compiled_helpers


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note the calls of Megatron's own compilation."""
    made: list[str] = []
    monkeypatch.setattr(utils, "compile_helpers", lambda: made.append("make"))
    compiled_helpers.apply()
    return made


def test_the_wheel_carries_it():
    from megatron.core.datasets import helpers_cpp

    assert helpers_cpp.__name__ == compiled_helpers.COMPILED


def test_nothing_is_compiled_where_it_is(calls: list[str]):
    utils.compile_helpers()
    assert calls == []


def test_a_source_installation_compiles(calls: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compiled_helpers, "COMPILED", "megatron.core.datasets.not_built_yet")
    utils.compile_helpers()
    assert calls == ["make"]


def test_megatron_looks_it_up_when_it_is_called():
    """`initialize` imports the name inside of its function: replacing it in `utils` is enough."""
    import inspect

    from megatron.training import initialize

    source = inspect.getsource(initialize._compile_dependencies)
    assert "from megatron.core.datasets.utils import compile_helpers" in source
