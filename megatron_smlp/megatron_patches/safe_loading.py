"""Reads checkpoints without running what is in them, on every device and in every tool.

A distributed checkpoint holds three kinds of pickles, and a pickle can call anything when it is
loaded. torch and Megatron read them without restraint, so the four functions below are replaced:

| function | what it reads | what is allowed now |
|---|---|---|
| FileSystemReader.read_metadata | `.metadata` | the classes of ALLOWED, all of them plain data |
| DefaultLoadPlanner.load_bytes | objects in `*.distcp` | what torch's `weights_only` allows |
| FileSystemReader.read_data | tensors in `*.distcp`, already so | pieces as the index says |
| load_common of Megatron | `common.pt` of older versions | what `weights_only` allows |

What is refused, and what cannot be read, is one line for the user: UnsafeCheckpointError and
DamagedCheckpointError. `weights_only` knows Megatron's own classes (megatron.core.safe_globals).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem

from megatron_smlp.checkpoints.index import check_metadata, check_piece
from megatron_smlp.errors import DamagedCheckpointError, UnsafeCheckpointError, UserError
from megatron_smlp.interrupts import is_interruption

DATA = "torch.distributed.checkpoint.metadata"
PLANS = "torch.distributed.checkpoint.planner"
FILES = "torch.distributed.checkpoint.filesystem"

# Everything that torch and Megatron put into `.metadata`; calling these makes data, and no more.
ALLOWED = {
    *((DATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((DATA, f"{kind}StorageMetadata") for kind in ("Tensor", "Bytes", "Chunk")),
    (DATA, "_MEM_FORMAT_ENCODING"),
    *((PLANS, name) for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),
    *((FILES, name) for name in ("_StorageInfo", "_StoragePrefix")),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
}

UNREADABLE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    AssertionError,  # torch's check of a piece's size
    AttributeError,
    EOFError,
    ImportError,
    IndexError,
    KeyError,
    OSError,
    RecursionError,
    RuntimeError,  # torch's zip reader
    TypeError,
    ValueError,
)


class _RefusedGlobal(pickle.UnpicklingError):
    """A pickle asks for something that is not plain data."""


class MetadataUnpickler(pickle.Unpickler):
    """Builds the classes of ALLOWED and torch's dtypes, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        module = "pathlib" if module == "pathlib._local" else module  # its name in Python 3.13
        if (module, name) in ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise _RefusedGlobal(f"GLOBAL {module}.{name}")


def apply() -> None:
    """Replace the four functions, once per process."""
    from megatron.core.dist_checkpointing import serialization

    if hasattr(FileSystemReader.read_data, "__wrapped__"):
        return
    FileSystemReader.read_metadata = _read_metadata
    FileSystemReader.read_data = _file_by_file(FileSystemReader.read_data)
    DefaultLoadPlanner.load_bytes = _load_bytes
    serialization.load_common = _load_common
    torch.serialization.add_safe_globals(
        [frozenset]
    )  # plain data that torch does not count as such


def _read_metadata(self: Any, *args: Any, **kwargs: Any) -> Metadata:
    """torch's own, but for the unpickler."""
    path = Path(self._get_metadata_path(kwargs.get("rank")))
    with readable(path), self.fs.create_stream(path, "rb") as file:
        metadata = load_metadata(file)
    if getattr(metadata, "storage_meta", None) is None:
        metadata.storage_meta = StorageMeta()
    metadata.storage_meta.load_id = self.load_id
    return metadata


def load_metadata(file: IO[bytes]) -> Metadata:
    """The index of a distributed checkpoint, from its `.metadata`.

    Raises:
        pickle.UnpicklingError: it asks for a class that is not allowed, names a file elsewhere, or
            describes tensors that its pieces do not make.
    """
    metadata: Metadata = MetadataUnpickler(file).load()
    check_metadata(metadata)
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
    loaded = torch.load(value, weights_only=True)
    if self.flatten_state_dict:
        set_element(self.original_state_dict, self.mappings[name], loaded)
    else:
        self.state_dict[name] = loaded


def _load_common(checkpoint_dir: str | Path) -> Any:
    path = Path(checkpoint_dir) / "common.pt"
    with readable(path):
        return torch.load(path, map_location="cpu", weights_only=True)


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Name the file in what goes wrong while it is read.

    Raises:
        UnsafeCheckpointError: it asks for code to be run.
        DamagedCheckpointError: it cannot be read.
    """
    try:
        yield
    except UserError:
        raise
    except UNREADABLE as error:
        if is_interruption(error):
            raise KeyboardInterrupt from error
        raise _explained(path, error) from error


def _explained(path: Path, error: BaseException) -> UserError:
    words = " ".join(str(error).split())
    unsafe = re.search(r"GLOBAL ([\w.]+)", words)
    if unsafe and isinstance(error, pickle.UnpicklingError):
        return UnsafeCheckpointError(
            f"{path} asks to run {unsafe[1]} while it is loaded, which a checkpoint has no need "
            "of: refused, and nothing was run. Get the checkpoint from who made it, or delete it."
        )
    reason = words.split(". ")[0][:200] or type(error).__name__
    return DamagedCheckpointError(f"{path} cannot be read ({reason}): the file is damaged.")
