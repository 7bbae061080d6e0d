"""Write a checkpoint in Megatron's distributed format, one tensor in memory at a time.

torch's own writer keeps every tensor until the last is written: docs/decisions/0036.
"""

from __future__ import annotations

import argparse
import contextlib
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_smlp.checkpoints import integrity
from megatron_smlp.checkpoints.folders import RELEASE, TRACKER, iteration_folder
from megatron_smlp.checkpoints.run_record import write_records

SHARD_BYTES = 4 << 30
"""Size from which another file begins, since ranks share the check of a checkpoint by files."""


class TorchDistWriter:
    """Appends tensors and objects to files, and indexes them in `.metadata`.

    Use as a context manager; leaving it without an error completes the checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder, self.shards = folder, 0
        self.metadata = Metadata(state_dict_metadata={}, storage_data={})
        self.metadata.storage_meta = StorageMeta(checkpoint_id=str(folder))
        self.metadata.version = CURRENT_DCP_VERSION

    def __enter__(self) -> TorchDistWriter:
        self._begin_shard()
        return self

    def _begin_shard(self) -> None:
        self.shard = f"__0_{self.shards}.distcp"
        self.file: BinaryIO = (self.folder / self.shard).open("wb")
        self.shards += 1

    def __exit__(self, *error: object) -> None:
        if error[0] is not None:
            with contextlib.suppress(OSError):
                self.file.close()
            return
        self.file.close()  # `seal` brings it to the disk
        with (self.folder / ".metadata").open("wb") as file:
            pickle.dump(self.metadata, file)
        save_config(CheckpointingConfig("torch_dist"), str(self.folder))

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a whole tensor; any layout can read its shards from it."""
        tensor = tensor.contiguous()
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()  # torch.save writes the whole storage of a view
        offsets = torch.Size([0] * tensor.dim())
        chunk = ChunkStorageMetadata(offsets=offsets, sizes=tensor.shape)
        self.metadata.state_dict_metadata[name] = TensorStorageMetadata(
            TensorProperties.create_from_tensor(tensor), tensor.shape, [chunk]
        )
        self._append(MetadataIndex(name, offsets), tensor)

    def add_object(self, name: str, value: Any) -> None:
        """Append plain data; Megatron wraps what it saves in lists."""
        self.metadata.state_dict_metadata[name] = BytesStorageMetadata()
        self._append(MetadataIndex(name), value)

    def _append(self, index: MetadataIndex, value: Any) -> None:
        if self.file.tell() >= SHARD_BYTES:
            self.file.close()
            self._begin_shard()
        offset = self.file.tell()
        try:
            torch.save(value, self.file)
        except RuntimeError as error:  # torch closes its archive after another error
            if isinstance(error.__context__, OSError | KeyboardInterrupt):
                raise error.__context__ from None
            raise
        length = self.file.tell() - offset
        self.metadata.storage_data[index] = _StorageInfo(self.shard, offset, length)


def weights_state(
    flags: Mapping[str, Any], layout: Mapping[str, int], tokenizer: Mapping[str, Any]
) -> dict[str, Any]:
    """Return Megatron's own state for weights at iteration 0, without optimizer state.

    Args:
        flags: the model's, for Megatron's record of arguments.
        layout: parallel sizes, by Megatron's argument names.
        tokenizer: the flags that name it; empty if it is not known.
    """
    return {
        "args": argparse.Namespace(
            **{**tokenizer, **flags},
            **layout,
            add_position_embedding=True,  # Megatron compares its default with the run's
            no_save_optim=True,
            no_save_rng=True,
            consumed_train_samples=0,
            consumed_valid_samples=0,
            skipped_train_samples=0,
        ),
        "checkpoint_version": 3.0,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    }


def write_checkpoint(
    run: Path,
    iteration: int | None,
    tensors: Iterable[tuple[str, Tensor]],
    objects: Mapping[str, Any],
    *,
    flags: Mapping[str, Any],
    record: Mapping[str, Any],
) -> None:
    """Write a run's folder with one checkpoint, its checksums and the tracker.

    Args:
        iteration: None for a release, which holds only weights.
        objects: what to save besides tensors; Megatron's own state is under COMMON.
        flags: for model.json.
        record: for run.json.
    """
    folder = run / RELEASE if iteration is None else iteration_folder(run, iteration)
    with TorchDistWriter(folder) as writer:
        for name, tensor in tensors:
            writer.add(name, tensor)
            del tensor  # frees it before the next one is read
        for name, value in objects.items():
            writer.add_object(name, value)
    write_records(folder, flags, record)
    integrity.seal(folder)
    tracked = RELEASE if iteration is None else str(iteration)
    (run / TRACKER).write_text(tracked, encoding="utf-8")
