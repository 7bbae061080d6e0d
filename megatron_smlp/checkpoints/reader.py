"""Read the tensors of Megatron's distributed checkpoints: one process, no process groups."""

from __future__ import annotations

import io
import math
import zipfile
from pathlib import Path
from typing import IO, Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from megatron_smlp.checkpoints.index import check_piece
from megatron_smlp.conversion.safetensors_files import BLOCK, bytes_of
from megatron_smlp.conversion.tensors import Spec
from megatron_smlp.errors import DamagedCheckpointError
from megatron_smlp.megatron_patches import safe_loading


class TorchDistReader:
    """What one checkpoint folder holds: whole tensors under global names, and objects.

    Raises:
        UserError: the index is missing or damaged, or would run code.
    """

    def __init__(self, folder: Path) -> None:
        safe_loading.apply()
        self.folder = folder
        metadata = FileSystemReader(str(folder)).read_metadata()
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

    def read(self, name: str, row: int | None = None) -> Tensor:
        """One tensor, or one row of it, whatever the pieces in which ranks wrote it.

        Raises:
            DamagedCheckpointError: a piece cannot be read.
        """
        entry = self.entries[name]
        if row is None:
            whole = torch.empty(entry.size, dtype=entry.properties.dtype)
            self.read_into(whole, name)
            return whole
        one = torch.empty(entry.size[1:], dtype=entry.properties.dtype)
        self.read_into(one[None], name, start=row)
        return one

    def read_into(self, target: Tensor, name: str, *, start: int = 0) -> None:
        """Fill a tensor with rows of the one of this name, from `start` on.

        Each piece goes from the disk to its place, so that memory holds the tensor and no more.

        Raises:
            DamagedCheckpointError: a piece cannot be read.
        """
        target = target if target.dim() else target[None]
        for chunk in self.entries[name].chunks:
            offsets, sizes = chunk.offsets or (0,), chunk.sizes or (1,)
            first = max(offsets[0], start)
            last = min(offsets[0] + sizes[0], start + len(target))
            if first >= last:
                continue
            spans = zip(offsets[1:], sizes[1:], strict=True)
            rest = (slice(begin, begin + size) for begin, size in spans)
            part = target[(slice(first - start, last - start), *rest)]
            skip = (first - offsets[0]) * math.prod(sizes[1:]) * target.itemsize
            self._read_piece(part, name, chunk, skip=skip)

    def _read_piece(
        self, target: Tensor, name: str, chunk: ChunkStorageMetadata, *, skip: int
    ) -> None:
        path, part = self._open(self.storage[MetadataIndex(name, chunk.offsets)])
        with safe_loading.readable(path), part:
            written = check_piece(part, (tuple(chunk.sizes), target.dtype), name)
            if not written.is_contiguous() or written.storage_offset():
                raise DamagedCheckpointError(f"{path} holds {name} otherwise than row by row.")
            part.seek(0)
            with zipfile.ZipFile(part) as archive:
                [values] = [n for n in archive.namelist() if n.endswith("/data/0")]
                with archive.open(values) as stream:  # which compares a checksum at its end
                    if skip:
                        stream.seek(skip)
                    _fill(target, stream)

    def read_object(self, name: str) -> Any:
        """What is saved under a name that is no tensor's, of types that `weights_only` allows."""
        return self._load(self.storage[MetadataIndex(name)])

    def _load(self, place: Any) -> Any:
        path, part = self._open(place)
        with safe_loading.readable(path), part:
            return torch.load(part, map_location="cpu", weights_only=True)

    def _open(self, place: Any) -> tuple[Path, io.BufferedReader]:
        path: Path = self.folder / place.relative_path
        with safe_loading.readable(path):
            return path, io.BufferedReader(_Part(path.open("rb"), place.offset, place.length))


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

    def close(self) -> None:
        self.file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        self.file.seek(self.offset + self.position)
        left = max(0, self.length - self.position)
        count: int = self.file.readinto(memoryview(buffer)[:left])  # type: ignore[attr-defined]
        self.position += count
        return count


def _fill(target: Tensor, stream: IO[bytes]) -> None:
    """Fill a tensor, which may be a part of a larger one, with values row by row."""
    if not target.is_contiguous():
        for row in target:
            _fill(row, stream)
    elif target.numel():
        values = bytes_of(target)
        for start in range(0, target.nbytes, BLOCK):
            length = min(BLOCK, target.nbytes - start)
            values[start : start + length] = stream.read(length)  # ValueError where it is shorter
