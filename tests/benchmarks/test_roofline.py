"""The estimate for one H100: its arithmetic, and that docs/performance.md has what it gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import roofline
from roofline import Count

from megatron_smlp.accounting.costs import ModelShape, model_cost

ROOT = Path(__file__).parents[2]
COUNTS = ROOT / "benchmarks" / "results" / "roofline.json"


@pytest.fixture(scope="module")
def counted() -> dict[str, Any]:
    return json.loads(COUNTS.read_text(encoding="utf-8"))


def small(samples: int, experts: int, *, assignments: int = 0) -> Count:
    """1000 operators and 10 an expert, 6 bytes a sample and 3 a parameter."""
    parameters = 100 * (1 + experts)
    return Count(
        samples=samples,
        experts=experts,
        parameters=parameters,
        operators=1000 + 10 * experts,
        bytes=6 * samples + 3 * parameters,
        assignments=assignments,
    )


@pytest.mark.parametrize("experts", [0, 2])
def test_the_equations_are_solved(experts: int):
    one, other = small(1, experts), small(2, 2 * experts)
    count = roofline.full(one, other, samples=8, experts=32, parameters=7000, scale=16.0)
    assert count.operators == (1000 + 10 * 32 if experts else 1000)
    assert count.bytes == pytest.approx(16 * 8 * 6 + 3 * 7000)


def test_assignments_are_put_in_as_kernels():
    one, other = small(1, 2, assignments=3), small(2, 4, assignments=3)
    count = roofline.full(one, other, samples=8, experts=32, parameters=7000, scale=16.0)
    assert count.operators == 1000 + 10 * 32 + 3 * roofline.KERNELS
    scores = 8 * 1024 * 32 * 4
    assert count.bytes == pytest.approx(16 * 8 * 6 + 3 * 7000 + 3 * roofline.KERNELS * scores)


def test_one_row_from_its_counts(counted: dict[str, Any]):
    """gMLP: no experts; by hand."""
    found = counted["gmlp"]
    one, other = found["small"]
    # What two samples add to one is of samples; the rest is of parameters.
    of_sample = other["bytes"] - one["bytes"]
    of_parameters = one["bytes"] - of_sample
    size = 8 * 16 * of_sample + of_parameters * found["parameters"] / one["parameters"]
    compute = found["flops"] / 989e12
    step = max(5e-6 * one["operators"], size / 3.35e12 + compute)
    _, times = roofline.row_of(found)
    assert times.step == pytest.approx(1e3 * step)
    assert times.mfu == pytest.approx(compute / step)


@pytest.mark.parametrize("system", json.loads(COUNTS.read_text(encoding="utf-8")))
def test_its_sizes_are_those_of_the_configuration(system: str, counted: dict[str, Any]):
    known = roofline.expected(system)
    found = counted[system]
    assert found["parameters"] == known["total_parameters"]
    assert found["flops"] == 24e12 * known["forward_needed_tflops_per_1024_tokens"]
    sizes = [(count["samples"], count["experts"]) for count in found["small"]]
    assert sizes == [(1, 2), (2, 4)] if found["experts"] else [(1, 0), (2, 0)]


@pytest.mark.parametrize("system", roofline.SYSTEMS)
def test_the_small_versions_are_accepted_and_counted(system: str, parse: Any):
    size = {"samples": 1, "experts": 2 if roofline.SYSTEMS[system] else 0, "width": 64}
    args = parse(roofline.command_line(system, **size), base="")
    expected = roofline.expected(system, **size)["total_parameters"]
    assert model_cost(ModelShape.from_args(args)).parameters == expected


def test_the_table_of_the_documentation(counted: dict[str, Any]):
    """python benchmarks/roofline.py table benchmarks/results/roofline.json"""
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert roofline.table(counted) in text
