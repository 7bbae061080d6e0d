"""Kernels replace many operators on a CUDA device: launches and waits, counted."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from support.launches import REPOSITORY, run_command

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def counted() -> dict[str, Any]:
    done = run_command(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name("kernel_counts.py"))],
        CUDA_VISIBLE_DEVICES="",
        TRITON_INTERPRET="1",
        PYTHONPATH=f"{REPOSITORY / 'tests'}:{REPOSITORY}",
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_balanced_assignment_is_thirty_operators_and_no_wait(counted: dict[str, Any]):
    record = counted["assignment"]
    assert record["counts"] == [12] * 8
    assert record["on"] == ["cuda:0", "cuda:0"]
    assert record["launches"] > 20
    assert record["operators"] <= 30
    assert record["synchronisations"] == {}


# Shares of the parts' bytes. With one head there is no copy per head, so less can be saved; the
# rest is v, g, dg and dv, which one kernel passes to the next.
SHARES = {"one head": 0.56, "eight heads": 0.4, "partial prediction": 0.25}


@pytest.mark.parametrize("case", SHARES)
def test_a_gate_is_a_few_launches_and_a_fraction_of_the_bytes(case: str, counted: dict[str, Any]):
    """Forward and backward, in a layer of a model that trains."""
    ours, parts = (counted["gates"][case][way]["gate"] for way in ("kernels", "parts"))
    assert ours["bytes"] <= SHARES[case] * parts["bytes"]
    assert ours["synchronisations"] == {}
    if case == "partial prediction":  # where the router is most of it
        assert ours["operators"] <= parts["operators"] / 2
    else:
        assert ours["operators"] <= 10 < parts["operators"]


@pytest.mark.parametrize("case", SHARES)
def test_training_by_kernels_is_training_by_parts(case: str, counted: dict[str, Any]):
    ours, parts = (counted["gates"][case][way]["loss and norm"] for way in ("kernels", "parts"))
    assert ours[0] == pytest.approx(parts[0], rel=2e-4)
    assert ours[1] == pytest.approx(parts[1], rel=5e-3)  # bf16 rounds in other places
    assert ours != parts, "the same bits: no kernel ran"
