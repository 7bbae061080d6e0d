"""Read every tensor of a Megatron checkpoint, optimizer state included, in one process."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata


def checkpoint_tensors(folder: Path, iteration: int) -> dict[str, Tensor]:
    reader = FileSystemReader(str(folder / f"iter_{iteration:07d}"))
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one process is the intention
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors
