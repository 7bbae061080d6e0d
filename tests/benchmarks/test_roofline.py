"""The estimate for one H100: its arithmetic, and that docs/performance.md shows its results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import roofline
import roofline_counts

from megatron_smlp.accounting.costs import ModelShape, model_cost

ROOT = Path(__file__).parents[2]
COUNTS = ROOT / "benchmarks" / "results" / "roofline.json"


@pytest.fixture(scope="module")
def counted() -> dict[str, Any]:
    return json.loads(COUNTS.read_text(encoding="utf-8"))


@pytest.mark.parametrize("system", json.loads(COUNTS.read_text(encoding="utf-8")))
def test_its_sizes_are_those_of_the_configuration(system: str, counted: dict[str, Any]):
    known = roofline_counts.expected(system)
    found = counted[system]
    assert found["parameters"] == known["total_parameters"]
    assert found["flops"] == 24e12 * known["forward_needed_tflops_per_1024_tokens"]
    assert sum(found["flops_by_kind"].values()) == pytest.approx(found["flops"])
    assert {name: found[name] for name in ("flops_by_kind", "choices")} == (
        roofline_counts.products_of(system)
    )
    assert found["parameters_of_gpu"] == known["per_gpu"]["parameters"]
    sizes = [(c["samples"], c["experts"], c["micro_batches"]) for c in found["small"]]
    experts = 2 if found["experts"] else 0
    assert sizes == [(s, s * experts, m) for m in (1, 2) for s in (1, 2)]


@pytest.mark.parametrize("system", roofline_counts.SYSTEMS)
def test_the_small_versions_are_accepted_and_counted(system: str, parse: Any):
    size = {"samples": 1, "experts": 2 if roofline_counts.SYSTEMS[system] else 0, "width": 64}
    args = parse(roofline_counts.command_line(system, **size), base="")
    expected = roofline_counts.expected(system, **size)["total_parameters"]
    assert model_cost(ModelShape.from_args(args)).parameters == expected


def test_the_table_of_the_documentation(counted: dict[str, Any]):
    """python benchmarks/roofline.py table benchmarks/results/roofline.json"""
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert roofline.table(counted) in text
