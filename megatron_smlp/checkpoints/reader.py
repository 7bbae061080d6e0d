"""Read the tensors of Megatron's distributed checkpoints: one process, no process groups.

torch's own reader loads a whole piece into memory in addition to the tensor, even for one row, and
does not verify its checksum: docs/decisions/0036.
"""

from __future__ import annotations

import contextlib
import math
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _ReaderView

from megatron_smlp.checkpoints.safe_unpickling import load_object, read_index, readable
from megatron_smlp.checkpoints.tensors import Spec
from megatron_smlp.errors import DamagedCheckpointError

BLOCK_BYTES = 2**20


class TorchDistReader:
    """The contents of one checkpoint folder: whole tensors under global names, and objects.

    Raises:
        UserError: the index is missing or damaged, or would run code.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = read_index(folder)
        self.storage = index.storage_data
        self.entries: dict[str, TensorStorageMetadata] = {}
        self.objects: list[str] = []
        for name, entry in sorted(index.state_dict_metadata.items()):
            if isinstance(entry, TensorStorageMetadata):
                self.entries[name] = entry
            else:
                self.objects.append(name)
        self.all_specs = {
            name: Spec(tuple(entry.size), entry.properties.dtype)
            for name, entry in self.entries.items()
        }
        """Shapes and dtypes of all tensors, optimizer state included."""

    def read(self, name: str, row: int | None = None) -> Tensor:
        """Return one tensor, or one row of it, assembled from the pieces that ranks wrote.

        Raises:
            DamagedCheckpointError: a piece cannot be read.
        """
        spec = self.all_specs[name]
        tensor = torch.empty(spec.shape if row is None else spec.shape[1:], dtype=spec.dtype)
        self.read_into(tensor if row is None else tensor[None], name, start=row or 0)
        return tensor

    def read_into(self, target: Tensor, name: str, *, start: int = 0) -> None:
        """Fill `target` with rows of the named tensor, from row `start` on.

        Each piece goes straight from the disk to its place, so memory holds only the tensor.

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
        with self._open(MetadataIndex(name, chunk.offsets)) as part:
            written = torch.load(part, map_location="meta", weights_only=True)
            is_as_said = written.shape == chunk.sizes and written.dtype == target.dtype
            if not is_as_said or not written.is_contiguous() or written.storage_offset():
                raise DamagedCheckpointError(
                    f"{part.base_stream.name} does not hold {name} row by row, as its index says."
                )
            part.seek(0)
            with zipfile.ZipFile(part) as archive:
                [values] = [n for n in archive.namelist() if n.endswith("/data/0")]
                with archive.open(values) as stream:  # verifies a checksum at its end
                    if skip:
                        stream.seek(skip)
                    _fill(target, stream)
                    while not skip and stream.read(BLOCK_BYTES):  # which covers all values
                        pass

    def read_object(self, name: str) -> Any:
        """Return the saved object of this name, if `weights_only` allows its types."""
        with self._open(MetadataIndex(name)) as part:
            return load_object(part)

    @contextlib.contextmanager
    def _open(self, index: MetadataIndex) -> Iterator[_Part]:
        place = self.storage[index]
        path = self.folder / place.relative_path
        with readable(path), path.open("rb") as file:
            yield _Part(file, place.offset, place.length)


class _Part(_ReaderView):
    """A part of a file as a file; torch's class gets the sign of offsets from the end wrong."""

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        if whence == os.SEEK_END:
            offset, whence = self.len + offset, os.SEEK_SET
        super().seek(offset, whence)
        return self.tell()


def _fill(target: Tensor, stream: IO[bytes]) -> None:
    """Fill a tensor, which may be a view of a larger one, row by row from a stream of values."""
    if not target.is_contiguous():
        for row in target:
            _fill(row, stream)
    elif target.numel():
        values = memoryview(target.reshape(-1).view(torch.uint8).numpy())
        for start in range(0, target.nbytes, BLOCK_BYTES):
            length = min(BLOCK_BYTES, target.nbytes - start)
            values[start : start + length] = stream.read(length)  # ValueError if it is shorter
