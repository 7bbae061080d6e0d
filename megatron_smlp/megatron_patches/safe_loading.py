"""Reads checkpoints without running what is in them, on every device.

torch and Megatron unpickle without restraint, so the four functions below are replaced:

| function | what it reads | what is allowed now |
|---|---|---|
| FileSystemReader.read_metadata | `.metadata` | plain data: checkpoints/safe_unpickling.py |
| DefaultLoadPlanner.load_bytes | objects in `*.distcp` | what torch's `weights_only` allows |
| FileSystemReader.read_data | tensors in `*.distcp`, already so | pieces as the index says |
| load_common of Megatron | `common.pt` of older versions | what `weights_only` allows |
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import IO, Any

from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem

from megatron_smlp.checkpoints.index import check_piece
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
    """torch's own, but for the unpickler."""
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
                _check_pieces(self, name, items)
                read(self, dataclasses.replace(plan, items=items), planner)
        return read(self, dataclasses.replace(plan, items=[]), planner)

    return read_data


def _check_pieces(self: Any, name: str, items: list[ReadItem]) -> None:
    with self.fs.create_stream(self.fs.concat_path(self.path, name), "rb") as file:
        for item in items:
            place = self.storage_data[item.storage_index]
            if place.piece is not None:
                check_piece(self._slice_file(file, place), place.piece, item.storage_index.fqn)


def _load_bytes(self: Any, read_item: Any, value: IO[bytes]) -> None:
    """torch's own, but for `weights_only`."""
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
