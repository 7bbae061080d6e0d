"""Loads checkpoints without executing code from them, on every device.

torch and Megatron unpickle anything; the functions that do so are replaced (table.py). `.metadata`
may hold plain data only (checkpoints/safe_unpickling.py), objects only what torch's `weights_only`
allows. Errors name the file that cannot be read.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import IO, Any

from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan

from megatron_smlp.checkpoints.safe_unpickling import load_metadata, load_object, readable


def apply() -> None:
    """Replace the four functions, once per process."""
    from megatron.core.dist_checkpointing import serialization

    if hasattr(FileSystemReader.read_data, "__wrapped__"):
        return
    FileSystemReader.read_metadata = _read_metadata
    FileSystemReader.read_data = _file_by_file(FileSystemReader.read_data)
    DefaultLoadPlanner.load_bytes = _load_bytes
    serialization.load_common = _load_common


def _read_metadata(self: Any, *args: Any, **kwargs: Any) -> Metadata:
    """Do what torch's method does, with a safe unpickler."""
    path = Path(self._get_metadata_path(kwargs.get("rank")))
    with readable(path), self.fs.create_stream(path, "rb") as file:
        metadata = load_metadata(file)
    if getattr(metadata, "storage_meta", None) is None:
        metadata.storage_meta = StorageMeta()
    metadata.storage_meta.load_id = self.load_id
    return metadata


def _file_by_file(read: Any) -> Any:
    @functools.wraps(read)
    def read_data(self: Any, plan: LoadPlan, planner: Any) -> Any:
        files: dict[str, list[Any]] = {}
        for item in plan.items:
            files.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        for name, items in files.items():
            with readable(Path(self.path) / name):
                read(self, dataclasses.replace(plan, items=items), planner)
        return read(self, dataclasses.replace(plan, items=[]), planner)

    return read_data


def _load_bytes(self: Any, read_item: Any, value: IO[bytes]) -> None:
    """Do what torch's method does, with `weights_only`."""
    from torch.distributed.checkpoint._nested_dict import set_element

    name = read_item.dest_index.fqn
    loaded = load_object(value)
    if self.flatten_state_dict:
        set_element(self.original_state_dict, self.mappings[name], loaded)
    else:
        self.state_dict[name] = loaded


def _load_common(checkpoint_dir: str | Path) -> Any:
    path = Path(checkpoint_dir) / "common.pt"
    with readable(path):
        return load_object(path)
