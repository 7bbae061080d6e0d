"""Kernels take the place of many operators on a CUDA device: launches and waits, counted."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from support.launches import REPOSITORY, run_command


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
