"""A conversion needs memory for its largest tensor, not for the whole model."""

import json
import sys
from pathlib import Path

import pytest
from support.launches import REPOSITORY, run_command

SHARE = 1.3
"""Bound on the peak, as a multiple of the largest tensor, in addition to one output shard."""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts the memory")
def test_memory_is_for_one_tensor(tmp_path: Path):
    """Models of 400 MB, whose largest tensors are an embedding and a stack of experts."""
    command = [sys.executable, "-m", "support.conversion_memory", str(tmp_path)]
    done = run_command(command, PYTHONPATH=f"{REPOSITORY}:{REPOSITORY / 'tests'}")
    print(done.stdout)
    for kind, found in json.loads(done.stdout.splitlines()[-1]).items():
        assert found["model"] > 3 * found["largest"]
        for conversion, peak in found["peaks"].items():
            bound = SHARE * found["largest"] + found["shard"]
            assert peak < bound, f"{kind}, {conversion}: {peak:,} bytes, at most {bound:,.0f}"
