"""Megatron's fused cross entropy becomes kernels for each GPU; what these take is counted."""

import json
import sys
from pathlib import Path

import pytest
from support.launches import REPOSITORY, run_command

MOVED = {"largest logit": 6, "predicted logit": 16, "loss": 8, "gradient": 18}
"""Bytes of a logit, read and written; docs/decisions/0086-fused-linear-cross-entropy.md."""


@pytest.mark.slow
def test_it_compiles_and_moves_what_is_written_down(tmp_path: Path):
    script, output = (
        REPOSITORY / "tests" / "support" / "compiled_loss.py",
        tmp_path / "kernels.json",
    )
    run_command([sys.executable, "-W", "ignore", str(script), str(output)], CUDA_VISIBLE_DEVICES="")
    table = json.loads(output.read_text(encoding="utf-8"))
    assert {name: entry["bytes of a logit"] for name, entry in table.items()} == MOVED
    for name, entry in table.items():
        assert entry["kernels"], name
        for kernel in entry["kernels"]:
            assert set(kernel) == {"80", "89", "90", "100", "120"}
            assert all(used["stack"] == 0 for used in kernel.values()), f"{name} spills"
