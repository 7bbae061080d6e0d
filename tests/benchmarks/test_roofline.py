"""The estimate for one H100: its arithmetic, and that docs/performance.md has what it gives."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import roofline
import roofline_counts
from roofline_counts import Count

from megatron_smlp.accounting.costs import ModelShape, model_cost

ROOT = Path(__file__).parents[2]
COUNTS = ROOT / "benchmarks" / "results" / "roofline.json"


@pytest.fixture(scope="module")
def counted() -> dict[str, Any]:
    return json.loads(COUNTS.read_text(encoding="utf-8"))


def small(samples: int, experts: int, micro_batches: int, *, assignments: int = 0) -> Count:
    """A micro-batch: 1000 operators and 10 an expert, 6 bytes a sample and 3 a parameter; an
    update: 50 operators and 2 an expert, 20 bytes a parameter.
    """
    parameters = 100 * (1 + experts)
    micro_batch = 6 * samples + 3 * parameters
    return Count(
        samples=samples,
        experts=experts,
        parameters=parameters,
        micro_batches=micro_batches,
        operators=micro_batches * (1000 + 10 * experts) + 50 + 2 * experts,
        bytes=micro_batches * micro_batch + 20 * parameters,
        assignments=assignments,
        gates={"one head": 2, "heads": 1},
    )


def versions(experts: int, **more: int) -> list[Count]:
    return [small(s, s * experts, m, **more) for m in (1, 2) for s in (1, 2)]


@pytest.mark.parametrize("experts", [0, 2])
def test_the_equations_are_solved(experts: int):
    micro_batch, update = roofline.parts(versions(experts))
    assert (micro_batch.n, micro_batch.m) == (1000, 10 if experts else 0)
    assert (update.n, update.m) == (50, 2 if experts else 0)
    assert (micro_batch.a, micro_batch.p) == pytest.approx((6, 3))
    assert (update.a, update.p) == pytest.approx((0, 20))


SHARE = {"dense": 0.5, "grouped": 0.25, "gate": 0.2, "memory": 0.8, "dispatch": 0.6}


def test_a_row_by_hand():
    """32 experts, of which a GPU has four; three assignments and three gates in a micro-batch."""
    found = {
        "small": [asdict(count) for count in versions(2, assignments=3)],
        "experts": 32,
        "parameters": 8e9,
        "parameters_of_gpu": 1e9,
        "flops": 1e12,
        "flops_by_kind": {"dense": 7e11, "grouped": 2e11, "gate": 1e11},
        "choices": 3,
    }
    row = roofline.row_of(found, SHARE)
    assert row.operators == 1000 + 10 * 4 + 3 * 27 + 3 * 10
    scores, gate = 8 * 1024 * 32 * 4, 8 * 1024 * 2048 * 2
    size = 16 * 8 * 6 + 3e9 + 3 * 27 * scores + (2 * 19.4 + 21.3) * gate
    assert row.gigabytes == pytest.approx(size / 1e9)
    bandwidth = 0.8 * 3.35e12
    assert row.update == pytest.approx(1e3 * 20 * 1e9 / bandwidth)
    compute = (7e11 / 0.5 + 2e11 / 0.25 + 1e11 / 0.2) / 989e12
    dispatch = 3 * 4 * (8 * 1024 * 1024 * 2) * 7 / 8 / (0.6 * 450e9)
    micro_batch = max(5e-6 * row.operators, size / bandwidth + compute + dispatch)
    step = micro_batch + 20e9 / bandwidth / 8
    assert row.mfu == pytest.approx(1e12 / 989e12 / step)


def test_efficiencies_are_ordered_and_have_sources():
    table = json.loads(roofline.EFFICIENCIES.read_text(encoding="utf-8"))
    for kind, entry in table.items():
        assert 0 < entry["low"] < entry["likely"] < entry["high"] < 1, kind
        assert len(entry["source"]) > 20, kind


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
