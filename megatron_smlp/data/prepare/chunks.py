"""Whole records of one input file, and the position after them."""

from dataclasses import dataclass
from typing import Any

CHUNK_BYTES = 2 << 20


@dataclass(frozen=True)
class Position:
    """A position between two records of the input."""

    file: int = 0
    """Number of the file in the list of inputs."""
    offset: int = 0
    """In bytes of uncompressed text for lines, in records for arrays and parquet."""
    line: int = 0
    """Lines (or records) before this position."""


START = Position()


@dataclass(frozen=True)
class Chunk:
    """Whole records, in the order of the input."""

    file: str
    first_line: int
    """Number of the first record in its file, from 1."""
    payload: bytearray | list[tuple[Any, ...]]
    """Raw lines or, for parquet, one tuple of values per record, in the order of the keys."""
    end: Position
    num_bytes: int
    """Uncompressed size, for bounds and progress."""
    damage: str | None = None
    """Why the file cannot be read beyond this chunk (which then has no records)."""
