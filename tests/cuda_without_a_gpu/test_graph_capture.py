"""--cuda-graph-impl local: no layer that gets a graph does what a capture refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from support.launches import REPOSITORY, run_command
from support.systems import SYSTEMS


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    done = run_command(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name("graph_capture.py"))],
        CUDA_VISIBLE_DEVICES="",
        PYTHONPATH=f"{REPOSITORY / 'tests'}:{REPOSITORY}",
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_layer_that_does_not_route_can_be_captured(system: str, found: dict[str, Any]):
    """Forward and backward: the host waits for nothing, and nothing of the CPU is read."""
    assert found[system]
    for kind, layer in found[system].items():
        assert layer["routes"] == ("MoE" in kind)
        assert layer["routes"] or layer["refused"] is None, kind


@pytest.mark.parametrize(
    ("system", "reason"), [("gshard", "event"), ("switch", "event"), ("smlp_partial", "tolist")]
)
def test_what_waits_is_refused(system: str, reason: str, found: dict[str, Any]):
    """The search would find it."""
    refused = [layer["refused"] for layer in found[system].values() if layer["refused"]]
    assert len(refused) == 1
    assert f"not permitted when stream is capturing: {reason}" in refused[0]


@pytest.mark.parametrize("system", ["base", "hash", "smlp_deterministic"])
def test_what_routes_without_a_wait_is_refused_for_its_python_alone(
    system: str, found: dict[str, Any]
):
    assert all(layer["refused"] is None for layer in found[system].values())
