"""The tuner takes what is faster with the same results; its row has the table's format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tune_kernels
from support.compiled_kernels import SHARED
from support.interpreted import interpreted
from support.tuning import ROW, TILES

from megatron_smlp.ops import tiles
from megatron_smlp.ops.tiles import Tile

# The second is fastest; none is by enough; none is at all.
CLOCKS = {(1.1, 1.5, 1.2): (1, 1.5), (0.9, 1.01, 0.5): (None, 1.0), (0.5, 0.5, 0.5): (None, 1.0)}


@pytest.fixture(scope="module")
def answers() -> list[Any]:
    calls = [
        ("support.tuning:tuned", (product, list(clock)))
        for product in tune_kernels.PRODUCTS
        for clock in CLOCKS
    ]
    return interpreted([*calls, ("support.tuning:tuned_to_other_results", ("values",))])


@pytest.mark.slow
def test_the_fastest_tile_is_chosen(answers: list[Any]):
    """Among real launches, interpreted, that give the results of today's row."""
    cases = [(product, choice) for product in tune_kernels.PRODUCTS for choice in CLOCKS.values()]
    for (product, (number, gain)), (row, seen) in zip(cases, answers[:-1], strict=True):
        expected = ROW if number is None else ROW._replace(**{product: TILES[number]})
        assert tuple(row) == tuple(expected)
        assert seen == pytest.approx(gain)


@pytest.mark.slow
def test_another_result_ends_it(answers: list[Any]):
    assert answers[-1].startswith("values with Tile(rows=16,")
    assert "another result" in answers[-1]


def test_a_row_is_written_as_it_is_read(tmp_path: Path):
    rows = json.loads(tiles.TABLE.read_text(encoding="utf-8"))
    tune_kernels.write(rows, tmp_path / "same.json")
    assert (tmp_path / "same.json").read_bytes() == tiles.TABLE.read_bytes()
    rows["90"] = tune_kernels.written(ROW, device="a GPU", gains={"gate": 1.2})
    tune_kernels.write(rows, tmp_path / "new.json")
    assert tiles.read(tmp_path / "new.json") == tiles.read() | {"90": ROW}


def test_tiles_that_spill_or_are_too_large_are_left_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tune_kernels, "PRODUCTS", ("weights",))
    sizes = [(64, 64, 64, 4, 3), (128, 256, 64, 8, 3), (128, 128, 64, 8, 5)]
    command = [word for size in sizes for word in ("--tile", ",".join(map(str, size)))]
    assert tune_kernels.main(["--compile-only", "89", *command]) == 0
    fits, spills, large = capsys.readouterr().out.splitlines()[1:]
    assert fits.split()[-1].isdigit()
    assert "bytes are spilled" in spills
    assert large.endswith("  no")
    assert int(large.split()[-2]) > SHARED[89]
    assert all(Tile(*size) in tune_kernels.candidates() for size in sizes[:2])
