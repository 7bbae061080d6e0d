"""Megatron's index builder ships compiled; if present, nothing is compiled, on any device."""

import pytest
from megatron.core.datasets import utils

from megatron_smlp.megatron_patches import compiled_helpers


def test_the_wheel_carries_it():
    from megatron.core.datasets import helpers_cpp

    assert helpers_cpp.__name__ == compiled_helpers.COMPILED


@pytest.mark.parametrize(
    ("compiled", "calls"), [(compiled_helpers.COMPILED, []), ("megatron.not_built_yet", ["make"])]
)
def test_it_is_compiled_where_it_is_missing(
    monkeypatch: pytest.MonkeyPatch, compiled: str, calls: list[str]
):
    made: list[str] = []
    monkeypatch.setattr(utils, "compile_helpers", lambda: made.append("make"))
    monkeypatch.setattr(compiled_helpers, "COMPILED", compiled)
    compiled_helpers.apply()
    utils.compile_helpers()
    assert made == calls


def test_megatron_looks_it_up_when_it_is_called():
    """`initialize` imports the name inside its function: replacing it in `utils` is enough."""
    import inspect

    from megatron.training import initialize

    source = inspect.getsource(initialize._compile_dependencies)
    assert "from megatron.core.datasets.utils import compile_helpers" in source
