"""What is in a checkpoint, and how two differ: a tensor at a time, without Megatron's groups."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_smlp.checkpoints.run_record import read_run_record
from megatron_smlp.checkpoints.structure import (
    MODEL,
    is_checkpoint_folder,
    iteration_of,
    tracked_folder,
)
from megatron_smlp.errors import UsageError
from megatron_smlp.platform import safe_loading


def checkpoint_of(path: str | Path) -> Path:
    """The folder of one checkpoint: `path` itself, or the one that the tracker of a run names.

    Raises:
        UsageError: there is none.
    """
    path = Path(path)
    if path.is_dir() and is_checkpoint_folder(path):
        return path
    folder = tracked_folder(path)
    if folder is None:
        raise UsageError(
            f"{path} holds no checkpoint: give the --save folder of a run, or an iter_ folder."
        )
    return folder


class Tensors:
    """The tensors of a checkpoint, whole, under their global names.

    Raises:
        UserError: the index is damaged, or would run code.
    """

    def __init__(self, folder: Path) -> None:
        safe_loading.apply()
        self.reader = FileSystemReader(str(folder))
        entries = self.reader.read_metadata().state_dict_metadata
        self.entries: dict[str, TensorStorageMetadata] = {
            name: entry
            for name, entry in sorted(entries.items())
            if isinstance(entry, TensorStorageMetadata)
        }

    def shape(self, name: str) -> list[int]:
        return list(self.entries[name].size)

    def load(self, name: str) -> Tensor:
        entry = self.entries[name]
        box = {name: torch.empty(entry.size, dtype=entry.properties.dtype)}
        with safe_loading.plain_errors(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that one process loads alone is the intention
            dcp.load(box, storage_reader=self.reader, no_dist=True)
        return box[name]


def describe(folder: Path) -> dict[str, Any]:
    """Iteration, layout, tokenizer, the flags that were given, and those of the model."""
    model = folder / MODEL
    flags = json.loads(model.read_text(encoding="utf-8")) if model.exists() else None
    record = read_run_record(folder) or {}
    return {
        "checkpoint": str(folder),
        "iteration": iteration_of(folder),
        "layout": record.get("layout"),
        "tokenizer": record.get("tokenizer"),
        "command_line": " ".join(record.get("command_line", [])) or None,
        "model": flags,
    }


def tensor_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Name, shape, type and norms of each tensor."""
    tensors = Tensors(folder)
    for name in tensors.entries:
        tensor = tensors.load(name)
        values = tensor.double()
        yield {
            "name": name,
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "norm": float(values.norm()),
            "max_abs": float(values.abs().max()) if values.numel() else 0.0,
        }


def differences(first: Path, second: Path) -> Iterator[dict[str, Any]]:
    """A row for each tensor that is not the same in both.

    `max_abs` is the largest difference of two elements, `relative` the norm of the difference over
    that of the first tensor (or of the second, where the first is zero).
    """
    ours, theirs = Tensors(first), Tensors(second)
    for name in sorted(ours.entries.keys() | theirs.entries.keys()):
        if name not in theirs.entries:
            yield {"name": name, "only_in": str(first)}
        elif name not in ours.entries:
            yield {"name": name, "only_in": str(second)}
        elif ours.shape(name) != theirs.shape(name):
            yield {"name": name, "shapes": [ours.shape(name), theirs.shape(name)]}
        else:
            mine, other = ours.load(name), theirs.load(name)
            if not torch.equal(mine, other):
                yield {"name": name, **_distance(mine.double(), other.double())}


def _distance(mine: Tensor, other: Tensor) -> dict[str, float]:
    gap = mine - other
    scale = float(mine.norm()) or float(other.norm())
    return {"max_abs": float(gap.abs().max()), "relative": float(gap.norm()) / scale}
