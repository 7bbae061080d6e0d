"""Runs that save checkpoints: read all tensors, compare with an undisturbed run, do damage."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from support.in_process import pretrained
from support.launches import steps
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_smlp.checkpoints.folders import iteration_folder, tracked_iteration
from megatron_smlp.checkpoints.integrity import verify

# Six steps, saved every two; appended to MINIMAL of support/in_process.py.
RUN = (
    "--architecture gmlp --num-layers 2 --hidden-size 8 --ffn-hidden-size 16 --log-interval 1 "
    "--train-iters 6 --save-interval 2 --lr-warmup-fraction 0.2"
)


def pretrain(flags: str) -> None:
    """Train RUN with more flags, in this process."""
    with pretrained(f"{RUN} {flags}"):
        pass


def carry_on(flags: str) -> None:
    """Train with these flags alone: the rest must come from a checkpoint."""
    with pretrained(flags, base=""):
        pass


def assert_ends_like(run: Path, undisturbed: Path, *, iteration: int = 6) -> None:
    """Check that weights, optimizer and logged steps are bitwise equal, and the last save whole."""
    ours, theirs = (checkpoint_tensors(folder, iteration) for folder in (run, undisturbed))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert steps(run) == steps(undisturbed)
    assert verify(iteration_folder(run, iteration)) == []
    assert tracked_iteration(run) == iteration


def flip_a_bit(path: Path) -> None:
    """Flip a bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def checkpoint_tensors(folder: Path, iteration: int) -> dict[str, Tensor]:
    reader = FileSystemReader(str(folder / f"iter_{iteration:07d}"))
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # loading in one process is intended
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors
