"""--hash-table balanced: HASH's table, balanced by the token counts of the training data."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.checkpoints import checkpoint_tensors
from support.in_process import MINIMAL, pretrained

from megatron_smlp.data.pairs.indexed import bin_path, idx_path, write_index
from megatron_smlp.routers.hash_table import balanced_table


def test_a_run_balances_by_its_own_data(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """The checkpoint's buffer is the tool's table; a resume keeps it without counting again."""
    ids = np.minimum(np.random.default_rng(3).geometric(0.1, size=6000), 99).astype(np.uint16)
    prefix = str(tmp_path / "data")
    ids.tofile(bin_path(prefix))
    write_index(
        idx_path(prefix),
        dtype=ids.dtype,
        lengths=np.full(300, 20, dtype=np.int32),
        sequences_per_document=np.ones(300, dtype=np.int32),
    )
    flags = (
        "--architecture gmlp --token-router hash --num-experts 4 --hash-table balanced "
        f"--save {tmp_path}/run"
    )
    base = MINIMAL.replace("--mock-data", f"--data-path {prefix} --split 80,15,5")
    expected = balanced_table(np.bincount(ids, minlength=100), num_experts=4)
    for steps, said in ((2, "balanced table"), (4, "the checkpoint's table")):
        with pretrained(f"{flags} --train-iters {steps}", base=base):
            assert f"token MoE (hash, {said}), experts: 4" in capfd.readouterr().out
        tensors = checkpoint_tensors(tmp_path / "run", steps)
        tables = [value for name, value in tensors.items() if name.endswith("router.table")]
        assert len(tables) == 4
        for table in tables:
            assert table[:100].tolist() == expected.tolist()


def test_without_data_to_count_the_table_is_random(parse: Callable[..., Any]):
    args = parse("--architecture gmlp --token-router hash --num-experts 4 --hash-table balanced")
    assert args.hash_table is None
