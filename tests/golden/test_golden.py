"""Resolved flags and dry runs stay as they are; behaviour.py records an intended difference."""

import json
import os
from collections.abc import Iterator
from unittest import mock

import pytest
from golden import behaviour


@pytest.fixture(autouse=True)
def launched() -> Iterator[None]:
    """Restore the environment that `behaviour` changes."""
    with mock.patch.dict(os.environ):
        yield


def test_flags_resolve_as_before():
    expected = json.loads(behaviour.NAMESPACES.read_text(encoding="utf-8"))
    found = behaviour.namespaces()
    assert found.keys() == expected.keys()
    for name, values in found.items():
        assert values == expected[name], name


def test_dry_runs_print_as_before():
    assert behaviour.dry_runs() == behaviour.DRY_RUNS.read_text(encoding="utf-8")
