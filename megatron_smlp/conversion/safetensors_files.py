"""Read and write folders of safetensors files one tensor at a time.

The format: u64 length of a JSON header, the header (name -> dtype, shape, begin and end in the
rest), the values. The safetensors library checks a header; it maps whole files into memory or wants
all tensors at once, where here a tensor is read into memory of its own and written by itself.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_smlp.checkpoints.tensors import Spec
from megatron_smlp.errors import DamagedCheckpointError, UsageError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
BLOCK = 2**20


class SafetensorsFolder:
    """The tensors of `model.safetensors`, or of all the files that its index names.

    Raises:
        UsageError: there is no such file in the folder, or two files hold the same name.
        DamagedCheckpointError: a file is missing, or not what it says.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.specs: dict[str, Spec] = {}
        self._places: dict[str, tuple[Path, int]] = {}
        for path in self._files():
            self._read_header(path)
        self._check_index()

    def _files(self) -> list[Path]:
        self.index = _read_index(self.folder / INDEX)
        if self.index is not None:
            return [self.folder / name for name in sorted(set(self.index.values()))]
        if (self.folder / SINGLE).is_file():
            return [self.folder / SINGLE]
        raise UsageError(
            f"{self.folder} holds neither {SINGLE} nor {INDEX}: give the folder of a Hugging Face "
            "model with safetensors weights."
        )

    def _read_header(self, path: Path) -> None:
        try:
            with safe_open(path, "pt"):  # offsets, sizes, gaps and text are the library's to check
                pass
            with path.open("rb") as file:
                entries, start = _header(file)
        except (OSError, ValueError, SafetensorError) as error:
            raise DamagedCheckpointError(f"{path} cannot be read ({error}).") from error
        for name, entry in entries:
            if name in self.specs:
                raise UsageError(f"{path} holds {name} a second time: which one counts is unclear.")
            spec, begin = _spec(path, name, entry)
            self.specs[name], self._places[name] = spec, (path, start + begin)

    def _check_index(self) -> None:
        if self.index is None:
            return
        for name, file in self.index.items():
            if name not in self.specs or self._places[name][0].name != file:
                raise DamagedCheckpointError(f"{self.folder / file} lacks {name}, see {INDEX}.")
        for name, (path, _) in self._places.items():
            if name not in self.index:
                raise UsageError(f"{path} holds {name}, which {INDEX} does not name.")

    def read(self, name: str, row: int | None = None) -> Tensor:
        """One tensor, or one row of it, in memory of its own."""
        spec = self.specs[name]
        tensor = torch.empty(spec.shape if row is None else spec.shape[1:], dtype=spec.dtype)
        self.read_into(tensor if row is None else tensor[None], name, start=row or 0)
        return tensor

    def read_into(self, target: Tensor, name: str, *, start: int = 0) -> None:
        """Fill a contiguous tensor with rows of the one of this name, from `start` on."""
        path, offset = self._places[name]
        if not target.numel():
            return
        with path.open("rb") as file:
            file.seek(offset + start * math.prod(target.shape[1:]) * target.itemsize)
            count = file.readinto(bytes_of(target))
        if count != target.nbytes:
            raise DamagedCheckpointError(f"{path} ends within {name}.")

    def are_same(self, one: str, other: str) -> bool:
        """Whether two tensors are equal bit by bit; compared in blocks."""
        if self.specs[one] != self.specs[other]:
            return False
        (first, begin), (second, start) = self._places[one], self._places[other]
        with first.open("rb") as left, second.open("rb") as right:
            left.seek(begin)
            right.seek(start)
            todo = self.specs[one].nbytes
            while todo > 0:
                size = min(todo, BLOCK)
                if left.read(size) != right.read(size):
                    return False
                todo -= size
        return True


def _read_index(path: Path) -> dict[str, str] | None:
    if not path.is_file():
        return None
    try:
        weights = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): str(file) for name, file in weights.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpointError(f"{path} is no index of safetensors files.") from error
    for file in files.values():
        if Path(file).name != file:
            raise UsageError(f"{path} names {file}, in another folder: refused.")
    return files


def _header(file: BinaryIO) -> tuple[list[tuple[str, dict[str, Any]]], int]:
    """The entries, one that is there twice too, and where the values begin; of a sound file."""
    (length,) = struct.unpack("<Q", file.read(8))
    pairs = json.loads(file.read(length), object_pairs_hook=list)
    return [(name, dict(entry)) for name, entry in pairs if name != "__metadata__"], 8 + length


def _spec(path: Path, name: str, entry: dict[str, Any]) -> tuple[Spec, int]:
    """What a tensor is, and the first of its bytes among the values."""
    if entry["dtype"] not in DTYPES:
        raise DamagedCheckpointError(
            f"{path} holds {name} of type {entry['dtype']}; what can be read is "
            f"{', '.join(DTYPES)}."
        )
    return Spec(tuple(entry["shape"]), DTYPES[entry["dtype"]]), entry["data_offsets"][0]


def bytes_of(tensor: Tensor) -> Any:
    """The memory of a contiguous tensor."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def shards(specs: Mapping[str, Spec], *, limit: int) -> list[list[str]]:
    """Names in order, cut into files of at most `limit` bytes; a larger tensor has its own."""
    files: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if files[-1] and size + spec.nbytes > limit:
            files.append([])
            size = 0
        files[-1].append(name)
        size += spec.nbytes
    return files


def write_folder(
    folder: Path, specs: Mapping[str, Spec], tensors: Iterable[tuple[str, Tensor]], *, limit: int
) -> None:
    """Write `tensors`, in the order of `specs`, and the index where there is more than one file.

    Args:
        limit: bytes of one file.
    """
    parts = shards(specs, limit=limit)
    stream = iter(tensors)
    where: dict[str, str] = {}
    for number, names in enumerate(parts, 1):
        file = SINGLE if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        with (folder / file).open("wb") as output:
            output.write(_encoded_header({name: specs[name] for name in names}))
            for name in names:
                actual, tensor = next(stream)
                assert (actual, Spec.of(tensor)) == (name, specs[name]), (actual, name)
                if tensor.numel():
                    output.write(bytes_of(tensor.contiguous()))
                del tensor  # before the next one is made
            output.flush()
            os.fsync(output.fileno())
        where |= dict.fromkeys(names, file)
    if len(parts) > 1:
        total = sum(spec.nbytes for spec in specs.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _encoded_header(specs: Mapping[str, Spec]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, spec in specs.items():
        end = offset + spec.nbytes
        entries[name] = {
            "dtype": NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # values are aligned
    return struct.pack("<Q", len(header)) + header
