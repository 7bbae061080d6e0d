"""What waits for a device, what a CUDA graph could hold, and the CPU platform minus one: what runs
on a CUDA device for each name that it replaces.

tests/contract/test_cpu_platform.py holds that the list is whole, and that nothing of it is replaced
where CUDA is. torch's names mean the device there; here a step is made with Megatron's own
functions in the other places.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from support.cpu_replacements import MEGATRONS
from support.launches import REPOSITORY, run_command
from support.systems import SYSTEMS

pytestmark = pytest.mark.slow

BY_PARTS = {name for name in MEGATRONS if name.endswith("_along_first_dim")}


@pytest.fixture(scope="module")
def said() -> dict[str, Any]:
    done = run_command(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name("probes.py"))],
        CUDA_VISIBLE_DEVICES="",
        PYTHONPATH=f"{REPOSITORY / 'tests'}:{REPOSITORY}",
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_what_waits_is_counted_and_refused_in_a_graph(said: dict[str, Any]):
    """Reads, and copies that do not say otherwise; nothing waits for what is computed."""
    counts = {name: count for name, (count, _) in said["waits"].items()}
    never = ("filled", "sent and not waited for", "copied into and not waited for", "computed")
    once = ("sent", "moved", "copied into", "read", "fetched", "fetched behind a read")
    assert counts == dict.fromkeys(never, 0) | dict.fromkeys(once, 1) | {"read one by one": 3}
    accepted = {name for name, (_, is_refused) in said["waits"].items() if not is_refused}
    assert accepted == {"filled", "computed"}


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_layer_that_does_not_route_can_be_captured(system: str, said: dict[str, Any]):
    """--cuda-graph-impl local, forward and backward: the host waits for nothing, and nothing of the
    CPU is read."""
    layers = said["captures"][system]
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
    """Counts of dropped choices, sums of prices that begin on the CPU, sizes of groups."""
    layers = said["captures"][system].values()
    [refused] = [layer["refused"] for layer in layers if layer["refused"]]
    assert f"not permitted when stream is capturing: {reason}" in refused


def test_a_capture_alone_would_take_the_token_ids_of_its_step(said: dict[str, Any]):
    """HASH: nothing is refused, and that it routes is what keeps it out of a graph."""
    [layer] = said["captures"]["hash"].values()
    assert layer == {"routes": True, "refused": None}


@pytest.mark.parametrize("name", sorted(MEGATRONS))
def test_megatrons_own_function_is_in_its_place(said: dict[str, Any], name: str):
    origin, calls = said["functions"][name]
    assert origin.split(".")[0] == "megatron"
    unused = name.startswith("megatron.core.transformer.moe.moe_utils")  # another place, one name
    assert calls or unused or name in BY_PARTS


def test_parts_of_unlike_sizes_are_nccls_to_exchange(said: dict[str, Any]):
    assert said["parts"] == {"all_gather": [3, 3, 5], "reduce_scatter": [3, 3, 5]}
