"""Which of each system's layers a CUDA graph could hold."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from support.launches import REPOSITORY, run_command
from support.systems import SYSTEMS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def said() -> dict[str, Any]:
    done = run_command(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name("probes.py"))],
        CUDA_VISIBLE_DEVICES="",
        PYTHONPATH=f"{REPOSITORY / 'tests'}:{REPOSITORY}",
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_layer_that_does_not_route_can_be_captured(system: str, said: dict[str, Any]):
    """--cuda-graph-impl local, forward and backward: the host waits for nothing, and the device
    reads nothing of the CPU."""
    layers = said[system]
    assert layers
    for kind, layer in layers.items():
        assert layer["routes"] == ("MoE" in kind)
        assert layer["routes"] or layer["refused"] is None, kind


@pytest.mark.parametrize(
    ("system", "reason"),
    [
        ("gshard", "copy to cpu at megatron/core/transformer/moe/"),
        ("switch", "copy to cpu at megatron/core/transformer/moe/"),
        ("base", "copy to cuda:0 at routers/base.py"),
        ("smlp_deterministic", "copy to cuda:0 at routers/base.py"),
        ("smlp_partial", "tolist at layers/feature_moe.py"),
    ],
)
def test_what_a_capture_refuses_is_found(system: str, reason: str, said: dict[str, Any]):
    """Refused are counts of dropped choices, price sums that start on the CPU, group sizes."""
    layers = said[system].values()
    [refused] = [layer["refused"] for layer in layers if layer["refused"]]
    assert f"not permitted when stream is capturing: {reason}" in refused


def test_a_capture_alone_would_take_the_token_ids_of_its_step(said: dict[str, Any]):
    """For HASH nothing is refused; only the fact that it routes keeps it out of a graph."""
    [layer] = said["hash"].values()
    assert layer == {"routes": True, "refused": None}
