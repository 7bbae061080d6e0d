"""The CPU platform minus one: what runs on a CUDA device for each name that it replaces.

tests/contract/test_cpu_platform.py holds that the list is whole, and that nothing of it is replaced
where CUDA is. torch's names mean the device there; here a step is made with Megatron's own
functions in the other places.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from support.cpu_replacements import MEGATRONS
from support.launches import REPOSITORY, run_command

BY_PARTS = {name for name in MEGATRONS if name.endswith("_along_first_dim")}


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    script = Path(__file__).with_name("minus_one.py")
    done = run_command(
        [sys.executable, str(script), str(tmp_path_factory.mktemp("run"))],
        CUDA_VISIBLE_DEVICES="",
        PYTHONPATH=f"{REPOSITORY / 'tests'}:{REPOSITORY}",
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", sorted(MEGATRONS))
def test_megatrons_own_function_is_in_its_place(probe: dict[str, Any], name: str):
    origin, calls = probe["functions"][name]
    assert origin.split(".")[0] == "megatron"
    unused = name.startswith("megatron.core.transformer.moe.moe_utils")  # another place, one name
    assert calls or unused or name in BY_PARTS


def test_parts_of_unlike_sizes_are_nccls_to_exchange(probe: dict[str, Any]):
    assert probe["parts"] == {"all_gather": [3, 3, 5], "reduce_scatter": [3, 3, 5]}
