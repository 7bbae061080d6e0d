"""Calls of Transformer Engine, which a stub records and checks against the real signatures.

Nothing is computed: `make first-gpu` does that where Transformer Engine is installed.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support.cover import selected, slow_unless_in
from support.launches import REPOSITORY, run_command
from support.systems import MODEL, SYSTEMS

SUPPORT = REPOSITORY / "tests" / "support"
BUILDS = SUPPORT / "transformer_engine_builds.py"
STAND_IN = f"{SUPPORT.parent}:{SUPPORT / 'transformer_engine_stub'}"
SIZES = "--seq-length 64 --global-batch-size 4 --train-iters 2 --bf16"
LAYOUTS = {
    "alone": (1, ""),
    "tp2": (2, "--tensor-model-parallel-size 2 --sequence-parallel --tp-comm-overlap"),
}
FP8 = """--fp8-format hybrid --fp8-param-gather --use-distributed-optimizer
    --allow-untested-flag fp8-format fp8-param-gather"""
GROUPED = "--moe-grouped-gemm"
VARIANTS = {
    "plain": "",
    "grouped": GROUPED,
    "fp8": FP8,
    "grouped_fp8": f"{GROUPED} {FP8}",
    "window": "--window-size 15,0",
}
SPARSE = [name for name, flags in SYSTEMS.items() if "--num-experts" in flags]
CASES = [
    (system, layout, variant)
    for system in SYSTEMS
    for layout in LAYOUTS
    for variant in VARIANTS
    if system in SPARSE or "grouped" not in variant
    if layout == "tp2" or "fp8" not in variant
    if variant != "window" or "--num-attention-heads" in SYSTEMS[system]
]
# One system per kind of layer; the others differ from these in their routers.
FAST = ("transformer", "gshard", "amlp", "smlp_partial")
COMPARED = (("alone", "plain"), ("tp2", "fp8"))
"""Builds whose checkpoints are compared with the local layers'."""
FAST_CASES = [
    *((system, *build) for system in FAST for build in COMPARED),
    ("transformer", "alone", "window"),
    ("gshard", "tp2", "grouped"),
    ("smlp_partial", "tp2", "grouped_fp8"),
]
MARKED = slow_unless_in(FAST_CASES, CASES)
NUM_EXPERTS = 4
HIDDEN, FFN = 64, 256
# Name of the buffer, input and output sizes over all ranks, and whether there is a bias.
ATTENTION = [("qkv", HIDDEN, 3 * HIDDEN, True), ("proj", HIDDEN, HIDDEN, True)]
MLP = [("fc1", HIDDEN, FFN, True), ("fc2", FFN, HIDDEN, True)]
GATING = [("fc1", HIDDEN, FFN, True), ("fc2", FFN // 2, HIDDEN, True)]


def dense_layers(system: str) -> list[tuple[str, int, int, bool]]:
    """Return the projections of all four layers, without those of experts."""
    if system == "transformer":
        return 4 * (ATTENTION + MLP)
    return 4 * (ATTENTION if "--num-attention-heads" in SYSTEMS[system] else GATING)


def expert_layers(system: str) -> int:
    if system not in SPARSE:
        return 0
    return 2 if system.startswith("smlp") else 4


@pytest.fixture(scope="module")
def recorded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Build every selected case, in one process that imports the stub."""
    folder: Path = tmp_path_factory.mktemp("transformer_engine")
    cases = {}
    systems = {system for (system,) in selected(request, "system")}
    asked = {(system, *build) for system in systems for build in COMPARED}
    for system, layout, variant in asked | selected(request, "system", "layout", "variant"):
        world, parallel = LAYOUTS[layout]
        flags = f"{MODEL} {SIZES} {SYSTEMS[system]} {parallel} {VARIANTS[variant]}"
        cases[f"{system} {layout} {variant}"] = {"world": world, "flags": flags}
    for system in systems:
        flags = f"{MODEL} {SIZES} {SYSTEMS[system]} --transformer-impl local"
        cases[f"{system} local"] = {"world": 1, "flags": flags}
    (folder / "cases.json").write_text(json.dumps(cases))
    result = folder / "recorded.json"

    command = [sys.executable, str(BUILDS), str(folder / "cases.json"), str(result)]
    run_command(command, PYTHONPATH=STAND_IN)
    return json.loads(result.read_text())


def calls(record: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [given for called, given in record["calls"] if called == name]


@pytest.mark.parametrize(("system", "layout", "variant"), MARKED)
def test_it_builds(recorded: dict[str, Any], system: str, layout: str, variant: str):
    record = recorded[f"{system} {layout} {variant}"]
    assert "error" not in record, record["error"]
    heads = 4 if "--num-attention-heads" in SYSTEMS[system] else 0
    attention = calls(record, "DotProductAttention")
    assert len(attention) == heads
    window = [15, 0] if variant == "window" else None
    assert all(given.get("window_size") == window for given in attention)
    grouped = "grouped" in variant
    assert len(calls(record, "GroupedLinear")) == (2 * expert_layers(system) if grouped else 0)
    padded = grouped and "fp8" in variant
    assert len(calls(record, "Fp8Padding")) == (expert_layers(system) if padded else 0)
    assert bool(calls(record, "fp8_model_init")) == ("fp8" in variant)


@pytest.mark.parametrize(("system", "layout", "variant"), MARKED)
def test_projections(recorded: dict[str, Any], system: str, layout: str, variant: str):
    """Each gets its tensor parallel group and, with overlap, the name of its buffer."""
    world = LAYOUTS[layout][0]
    linears = calls(recorded[f"{system} {layout} {variant}"], "Linear")
    dense = [given for given in linears if given["rng_tracker_name"] is None]
    for given in dense:
        assert given["parallel_mode"] in ("column", "row")
        assert given["tp_group"] == given["tp_size"] == world
        assert given["sequence_parallel"] == (world > 1)
        assert not given["fuse_wgrad_accumulation"]  # Apex's, which is not installed
        assert given["params_dtype"] == "torch.bfloat16"
    sizes = Counter((g["in_features"], g["out_features"], g["bias"]) for g in dense)
    assert sizes == Counter(layer[1:] for layer in dense_layers(system))
    if world > 1:
        named = Counter((g["ub_name"], g["in_features"], g["out_features"]) for g in dense)
        assert named == Counter(layer[:3] for layer in dense_layers(system))
        assert all(g["ub_overlap_ag"] and g["ub_overlap_rs"] for g in dense)


@pytest.mark.parametrize(
    ("system", "layout", "variant"), [case for case in MARKED if case.values[0] in SPARSE]
)
def test_experts(recorded: dict[str, Any], system: str, layout: str, variant: str):
    """Experts have no bias, no communication of their own, and their own random numbers."""
    world = LAYOUTS[layout][0]
    record = recorded[f"{system} {layout} {variant}"]
    grouped = "grouped" in variant
    name = "GroupedLinear" if grouped else "Linear"
    experts = [given for given in calls(record, name) if given["rng_tracker_name"] is not None]
    assert len(experts) == 2 * expert_layers(system) * (1 if grouped else NUM_EXPERTS)
    for given in experts:
        assert given["rng_tracker_name"] == "expert-parallel-rng"
        assert not given["bias"]
        assert given["tp_size"] == 1
        assert not given.get("ub_overlap_ag")
        assert not given.get("ub_overlap_rs")
        assert {given["in_features"], given["out_features"]} == {HIDDEN, FFN // world}
    assert all(given["num_gemms"] == NUM_EXPERTS for given in experts if grouped)


@pytest.mark.parametrize(("system", "layout", "variant"), MARKED)
def test_norms(recorded: dict[str, Any], system: str, layout: str, variant: str):
    """Norms of the slots and the final norm: gradients are summed where tokens are sharded."""
    norms = calls(recorded[f"{system} {layout} {variant}"], "LayerNorm")
    second = 4 if "--num-attention-heads" in SYSTEMS[system] else expert_layers(system)
    assert len(norms) == 4 + second + 1
    assert {given["sequence_parallel"] for given in norms} == {LAYOUTS[layout][0] > 1}


@pytest.mark.parametrize("system", slow_unless_in(FAST, SYSTEMS))
def test_a_checkpoint_is_the_local_ones(recorded: dict[str, Any], system: str):
    """Either implementation reads what the other one saved."""
    local = tensors(recorded[f"{system} local"])
    assert local
    for build in COMPARED:
        assert tensors(recorded[" ".join((system, *build))]) == local


def tensors(record: dict[str, Any]) -> set[str]:
    return {name for name in record["saved"] if not name.endswith("_extra_state")}
