"""Triton kernels compile for absent GPUs, within recorded resources; which GPUs run them.

tests/support/compiled_kernels.py makes benchmarks/results/kernels.json. If a number gets smaller,
run it again to record that; a larger one needs a reason.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.compiled_kernels import CAPABILITIES, CASES, SHARED, compiled, integers, lowered
from support.cover import slow_unless_in
from support.launches import REPOSITORY

from megatron_smlp.ops import tiles, triton_ready
from megatron_smlp.ops.triton_ready import use_kernels

WRITTEN = REPOSITORY / "benchmarks" / "results" / "kernels.json"
EVERY = list(itertools.product(CASES, CAPABILITIES))
FAST = [(name, 90) for name in ("gate: forward", "gate: dM, db, routed", "norm: backward")]
FAST += [("assignment: prices", 90), ("gate: dM in parts", 90), ("gate: dv, fp32 M", 89)]
# The matmul instruction on each: anything else would be several times as slow.
MULTIPLIES = {80: "mma.sync", 89: "mma.sync", 90: "wgmma", 100: "tcgen05", 120: "mma.sync"}


@pytest.mark.parametrize(("name", "capability"), slow_unless_in(FAST, EVERY))
def test_a_kernel_takes_no_more_than_is_written(name: str, capability: int):
    ours = compiled(CASES[name], capability)
    allowed = json.loads(WRITTEN.read_text(encoding="utf-8"))[name][str(capability)]
    for kind in ("registers", "stack", "shared"):
        assert ours[kind] <= allowed[kind], kind
    assert set(ours["instructions"]) == set(allowed["instructions"])


VARIANTS = {
    "assignment: choose, first": ("assignment: choose", {"FIRST": True}),
    "assignment: exchange, first": ("assignment: exchange", {"FIRST": True}),
    "assignment: exchange, last": ("assignment: exchange", {"LAST": True}),
    "gate: forward, added": ("gate: forward", {"HAS_ADDED": True}),
    "norm: backward, means": ("norm: backward", {"HAS_MEANS": True}),
}
"""Constants with which a kernel is launched but not measured."""
EVERY_CONSTANT = CASES | {
    name: replace(CASES[base], constants=CASES[base].constants | constants)
    for name, (base, constants) in VARIANTS.items()
}


# Those all of whose lines another one has: with an addend, bf16 M, 128 experts, or means.
CONTAINED = {"gate: forward", "gate: forward, fp32 M", "gate: dv, fp32 M"}
CONTAINED |= {"assignment: prices", "norm: backward"}


@pytest.mark.parametrize("name", slow_unless_in(set(EVERY_CONSTANT) - CONTAINED, EVERY_CONSTANT))
def test_a_kernel_takes_every_kind_of_integer(name: str):
    """Triton's front end turns an integer that is 1 into a constant; its interpreter does not."""
    case = EVERY_CONSTANT[name]
    for one in integers(case):
        lowered(case, ones=[one], divided=False)
    lowered(case, ones=(), divided=False)
    lowered(case, ones=(), divided=True)


def test_what_is_written_of_all_kernels():
    """Little is spilled, kernels fit where they run, and products use tensor cores."""
    written = json.loads(WRITTEN.read_text(encoding="utf-8"))
    assert set(written) == set(CASES)
    for (name, capability), record in ((e, written[e[0]][str(e[1])]) for e in EVERY):
        assert record["stack"] <= 32
        assert record["shared"] <= SHARED[capability]
        if name.startswith("gate") and "du1" not in name and "sums" not in name:
            assert record["stack"] == 0 or "fp32 M" in name
            assert set(record["instructions"]) == {MULTIPLIES[capability]}


@pytest.mark.parametrize("product", ["gate", "values", "weights"])
def test_the_default_tiles_fit_where_the_kernels_run(product: str):
    case = next(case for case in CASES.values() if case.product == product)
    for capability in (80, 90, 100):
        tile = getattr(tiles.for_architecture("none"), product)
        used = compiled(case.with_tile(tile), capability)
        assert used["shared"] <= min(SHARED.values())
        assert used["stack"] == 0


def test_a_gpu_has_the_row_of_its_architecture(monkeypatch: pytest.MonkeyPatch):
    written = tiles.read()
    assert set(written) == {tiles.DEFAULT, *map(str, CAPABILITIES)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, device.index))
    assert tiles.for_device(torch.device("cuda", 0)) == written["90"] != written["default"]
    assert tiles.for_device(torch.device("cuda", 9)) == written["default"]
    assert tiles.for_device(torch.device("cpu")) == written["default"]


@pytest.fixture
def on_cuda() -> Any:
    """Return a stub that says it is on a GPU; under the CPU platform a fake tensor would not."""
    return SimpleNamespace(device=SimpleNamespace(type="cuda"))


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Any:
    triton_ready._missing.cache_clear()
    triton_ready._say_once.cache_clear()
    yield monkeypatch
    triton_ready._missing.cache_clear()
    triton_ready._say_once.cache_clear()


def test_without_a_driver_it_is_said_once(
    on_cuda: Any, forgotten: Any, caplog: pytest.LogCaptureFixture
):
    """Triton looks for a driver on this machine and finds none."""
    assert not any(use_kernels("mixing", on_cuda) for _ in range(3))
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(
        "mixing runs without Triton kernels, and slower: Triton cannot use a GPU driver"
    )
    assert "\n" not in line


def test_what_runs_for_a_question_is_said_when_it_runs_again(
    on_cuda: Any, forgotten: Any, caplog: pytest.LogCaptureFixture
):
    with triton_ready.unsaid():
        use_kernels("mixing", on_cuda)
    assert not caplog.records
    use_kernels("mixing", on_cuda)
    assert len(caplog.records) == 1


@pytest.mark.parametrize(("arch", "reason"), [(90, ""), (75, "8.0 or more, not 75"), (89, "")])
def test_which_gpus_run_them(arch: int, reason: str, on_cuda: Any, forgotten: Any, caplog: Any):
    """By what a driver reports; a stub reports a number in its place."""
    from triton.runtime import driver

    target = SimpleNamespace(backend="cuda", arch=arch)
    active = SimpleNamespace(get_current_target=lambda: target)
    forgotten.setattr(driver, "_active", active)
    assert use_kernels("mixing", on_cuda) == (not reason)
    assert reason in caplog.text
    assert use_kernels("mixing", on_cuda, unsupported="it is for other tensors") is False
    assert "it is for other tensors" in caplog.text
