"""The suite's own parts: errors of runs come out, GPUs are seen where they are meant."""

import sys

import pytest
from support.runs import ending_well
from support.selection import looks_at_gpus


@pytest.mark.parametrize("expression", ["gpu", "gpu and not slow", "gpu or slow"])
def test_gpus_are_seen(expression: str):
    assert looks_at_gpus(expression)


@pytest.mark.parametrize("expression", ["", "not gpu", "not slow", "slow", "slow or not gpu"])
def test_gpus_are_hidden(expression: str):
    assert not looks_at_gpus(expression)


@pytest.mark.parametrize("code", [1, "a line that says why"])
def test_a_run_that_exits_with_an_error_is_not_hidden(code: object):
    """Megatron ends so where it cannot compile its helper, as an example."""
    with pytest.raises(SystemExit) as ended, ending_well():
        sys.exit(code)
    assert ended.value.code == code


@pytest.mark.parametrize("code", [None, 0])
def test_a_run_that_exits_as_asked_has_ended(code: object):
    with ending_well():
        sys.exit(code)
