"""Tiles, warps and stages of the causal gate's products, by the GPU's architecture: tiles.json.

benchmarks/tune_kernels.py writes a row of it. `device` says on which GPU a row was timed, and is
null where its numbers are the compiler's alone: registers, shared memory, nothing spilled.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

TABLE = Path(__file__).with_name("tiles.json")
DEFAULT = "default"
"""The row of an architecture that has none: it fits wherever the kernels run."""


class Tile(NamedTuple):
    """Of one product's results, and how it is computed."""

    rows: int
    columns: int
    depth: int
    """Terms of a sum that are read at once."""
    warps: int
    stages: int
    """Reads that are under way, this one included."""


class Tiles(NamedTuple):
    """One row."""

    gate: Tile
    """tri(M) v."""
    values: Tile
    """tri(M)' dg."""
    weights: Tile
    """tril(dg v')."""
    programs: int
    """Programs of dM at most that sums are cut into parts for: what runs at once on the largest GPU
    of the architecture. It is a number of the table, and not the device's, so that a run has the
    same bits on all of them."""


def for_wide_weights(tile: Tile) -> Tile:
    """Of M in fp32, of which a read takes twice the room: in three stages it would need 112 KiB."""
    return tile._replace(stages=tile.stages - 1)


def read(path: Path = TABLE) -> dict[str, Tiles]:
    """Architecture, as "90" -> its row."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    return {name: _row(row) for name, row in rows.items()}


def _row(row: dict[str, Any]) -> Tiles:
    gate, values, weights = (Tile(**row[product]) for product in ("gate", "values", "weights"))
    return Tiles(gate, values, weights, row["programs"])


def for_architecture(name: str) -> Tiles:
    """Return its row, else the default one."""
    rows = _table()
    return rows.get(name, rows[DEFAULT])


@cache
def _table() -> dict[str, Tiles]:
    return read()


@cache
def for_device(device: torch.device) -> Tiles:
    """Return the row of a device; an interpreter's CPU has the default one."""
    if device.type != "cuda":
        return for_architecture(DEFAULT)
    major, minor = torch.cuda.get_device_capability(device)
    return for_architecture(f"{major}{minor}")
