"""Check a checkpoint that has no checksums: do its index and its shards fit together?"""

from __future__ import annotations

from pathlib import Path

from megatron_smlp.checkpoints.safe_unpickling import read_index
from megatron_smlp.errors import UserError


def structural_problems(folder: Path) -> list[str]:
    """Name missing files, shards that are shorter than the index says, a damaged index."""
    missing = [name for name in ("metadata.json", ".metadata") if not (folder / name).exists()]
    if missing:
        return [f"{name} is missing" for name in missing]
    try:
        entries = (read_index(folder).storage_data or {}).values()
    except UserError as error:
        return [str(error)]
    ends: dict[str, int] = {}
    for entry in entries:
        end = entry.offset + entry.length
        ends[entry.relative_path] = max(end, ends.get(entry.relative_path, 0))
    return [problem for name, end in ends.items() if (problem := _problem(folder / name, end))]


def _problem(shard: Path, end: int) -> str | None:
    if not shard.exists():
        return f"{shard.name} is missing"
    size = shard.stat().st_size
    if size == 0:
        return f"{shard.name} is empty"
    return f"{shard.name} is cut off: {size} of {end} bytes" if size < end else None
