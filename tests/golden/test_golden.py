"""Resolved flags and dry runs stay as they are; a difference that is meant, behaviour.py writes."""

import json
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import behaviour  # noqa: E402


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore the environment that `behaviour` changes."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "CUDA_DEVICE_MAX_CONNECTIONS"):
        monkeypatch.setenv(name, "1" if name != "RANK" else "0")
        monkeypatch.delenv(name)


def test_flags_resolve_as_before():
    expected = json.loads(behaviour.NAMESPACES.read_text(encoding="utf-8"))
    found = behaviour.namespaces()
    assert found.keys() == expected.keys()
    for name, values in found.items():
        assert values == expected[name], name


def test_dry_runs_print_as_before():
    assert behaviour.dry_runs() == behaviour.DRY_RUNS.read_text(encoding="utf-8")
