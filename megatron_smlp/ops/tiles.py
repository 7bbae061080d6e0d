"""Tiles, warps and stages of the causal gate's products, by the GPU's architecture: tiles.json.

benchmarks/tune_kernels.py writes a row of it. `device` names the GPU on which the row was timed, or
is null where its numbers are the compiler's alone: registers, shared memory, nothing spilled.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

TABLE = Path(__file__).with_name("tiles.json")
DEFAULT = "default"
"""The row for an architecture without its own: it fits wherever the kernels run."""


class Tile(NamedTuple):
    """A tile of one product's results, and how it is computed."""

    rows: int
    columns: int
    depth: int
    """Terms of a sum that are read at once."""
    warps: int
    stages: int
    """Reads in flight, including the current one."""


class Tiles(NamedTuple):
    """One row of the table."""

    gate: Tile
    """tri(M) v."""
    values: Tile
    """tri(M)' dg."""
    weights: Tile
    """tril(dg v')."""
    programs: int
    """Limit of dM's programs up to which its sums are split into parts: what runs at once on the
    largest GPU of the architecture. It comes from the table, not from the device, so that a run is
    bitwise the same on all of them."""


def for_wide_weights(tile: Tile) -> Tile:
    """Return the tile for M in fp32, whose reads take twice the room: three stages need 112 KiB."""
    return tile._replace(stages=tile.stages - 1)


def read(path: Path = TABLE) -> dict[str, Tiles]:
    """Map each architecture, such as "90", to its row."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    return {name: _row(row) for name, row in rows.items()}


def _row(row: dict[str, Any]) -> Tiles:
    gate, values, weights = (Tile(**row[product]) for product in ("gate", "values", "weights"))
    return Tiles(gate, values, weights, row["programs"])


def for_architecture(name: str) -> Tiles:
    """Return the row of an architecture, else the default one."""
    rows = _table()
    return rows.get(name, rows[DEFAULT])


@cache
def _table() -> dict[str, Tiles]:
    return read()


@cache
def for_device(device: torch.device) -> Tiles:
    """Return the row of a device; the CPU, for Triton's interpreter, has the default one."""
    if device.type != "cuda":
        return for_architecture(DEFAULT)
    major, minor = torch.cuda.get_device_capability(device)
    return for_architecture(f"{major}{minor}")
