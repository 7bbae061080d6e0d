"""Read Megatron's distributed checkpoints without its process groups: one process, no GPU."""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from megatron_smlp.checkpoints.structure import (
    MODEL,
    TRACKER,
    iteration_folder,
    iteration_of,
    tracked_folder,
)
from megatron_smlp.conversion.tensors import Spec
from megatron_smlp.errors import DamagedCheckpointError, UsageError
from megatron_smlp.platform import safe_loading
from megatron_smlp.training.checkpoints import OLDER_THAN

NOT_WEIGHTS = ("optimizer.", "rng_state", "rerun_state_machine_state", "common_state")
COMMON = "common_state/shard_0_1"


class TorchDistCheckpoint:
    """The weights of one saved iteration, whole tensors under global names.

    Args:
        folder: the --save folder of a run, or one `iter_*` or `release` folder in it.
        iteration: which one, where the newest is not wanted.

    Raises:
        UsageError: there is no checkpoint in the folder, or not one of ours.
    """

    def __init__(self, folder: str | Path, *, iteration: int | None = None) -> None:
        safe_loading.apply()
        self.folder = _find(Path(folder), iteration)
        self.flags = _read_flags(self.folder)
        self.iteration = iteration_of(self.folder) or 0
        self.reader = FileSystemReader(str(self.folder))
        metadata = self.reader.read_metadata()
        self.storage = metadata.storage_data
        self.entries: dict[str, TensorStorageMetadata] = {}
        self.objects: list[str] = []
        for name, entry in metadata.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                self.entries[name] = entry
            elif isinstance(entry, BytesStorageMetadata):
                self.objects.append(name)
        self.all_specs = {
            name: Spec(tuple(entry.size), entry.properties.dtype)
            for name, entry in sorted(self.entries.items())
        }
        """Of weights and optimizer state."""
        self.specs = {
            name: spec for name, spec in self.all_specs.items() if not name.startswith(NOT_WEIGHTS)
        }

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """One weight at a time, in the order of their names."""
        for name in self.specs:
            yield name, self.read(name)

    def read(self, name: str) -> Tensor:
        """One tensor whole, whatever the pieces in which the ranks of its run wrote it.

        Raises:
            DamagedCheckpointError: a piece is missing or cannot be read.
        """
        entry = self.entries[name]
        whole: Tensor | None = None
        covered = 0
        for chunk in entry.chunks:
            piece = self._piece(name, chunk.offsets)
            if piece.shape != chunk.sizes:
                raise DamagedCheckpointError(
                    f"{self.folder} holds a piece of {name} that is {list(piece.shape)}, not "
                    f"{list(chunk.sizes)}: the files are damaged."
                )
            covered += piece.numel()
            if piece.shape == entry.size:
                return piece
            if whole is None:
                whole = torch.empty(entry.size, dtype=entry.properties.dtype)
            where = zip(chunk.offsets, chunk.sizes, strict=True)
            whole[tuple(slice(start, start + size) for start, size in where)] = piece
        if whole is None or covered != whole.numel():
            raise DamagedCheckpointError(f"{self.folder} lacks pieces of {name}.")
        return whole

    def _piece(self, name: str, offsets: torch.Size) -> Tensor:
        index = MetadataIndex(name, offsets)
        if index not in self.storage:
            raise DamagedCheckpointError(f"{self.folder} does not say where {name} is.")
        piece: Tensor = self._load(self.storage[index])
        return piece.detach()

    def read_object(self, name: str) -> Any:
        """What is saved under a name that is no tensor's, of types that `weights_only` allows."""
        return self._load(self.storage[MetadataIndex(name)])

    def _load(self, place: Any) -> Any:
        path = self.folder / place.relative_path
        with safe_loading.readable(path), path.open("rb") as file:
            part = io.BufferedReader(_Part(file, place.offset, place.length))
            return torch.load(part, map_location="cpu", weights_only=True)

    @cached_property
    def common(self) -> dict[str, Any]:
        """Megatron's own state: `args`, iteration, schedule; empty where it was not saved."""
        if COMMON not in self.objects:
            return {}
        saved = self.read_object(COMMON)
        state: dict[str, Any] = saved[0] if isinstance(saved, list) else saved
        return state

    @property
    def args(self) -> argparse.Namespace:
        """All flags of the run that saved it, as far as it recorded them."""
        args: argparse.Namespace = self.common.get("args") or argparse.Namespace()
        return args


class _Part(io.RawIOBase):
    """Some bytes of a file as a file of their own."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self.file, self.offset, self.length, self.position = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.length}[whence]
        self.position = base + offset
        return self.position

    def readinto(self, buffer: Any) -> int:
        self.file.seek(self.offset + self.position)
        left = max(0, self.length - self.position)
        count: int = self.file.readinto(memoryview(buffer)[:left])  # type: ignore[attr-defined]
        self.position += count
        return count


def _find(folder: Path, iteration: int | None) -> Path:
    if (folder / ".metadata").is_file():
        return folder
    if iteration is not None:
        found = iteration_folder(folder, iteration)
        if not found.is_dir():
            raise UsageError(f"--ckpt-step {iteration}: {found} does not exist.")
        return found
    newest = tracked_folder(folder)
    if newest is None:
        raise UsageError(
            f"{folder} holds no checkpoint: latest_checkpointed_iteration.txt is missing. Give "
            "the --save folder of a run."
        )
    if not newest.is_dir():
        raise UsageError(f"{newest} does not exist, but {TRACKER} names it.")
    return newest


def _read_flags(folder: Path) -> dict[str, Any]:
    path = folder / MODEL
    if not path.exists():
        raise UsageError(
            f"{folder} has no {MODEL}, which pretrain_smlp.py writes beside each checkpoint."
        )
    try:
        flags: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DamagedCheckpointError(f"{path} is not JSON ({error}).") from error
    return {**OLDER_THAN, **flags}
