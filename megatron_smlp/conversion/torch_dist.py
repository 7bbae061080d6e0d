"""Read Megatron's distributed checkpoints without its process groups: one process, no GPU."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_smlp.checkpoints.structure import iteration_folder, latest_iteration
from megatron_smlp.errors import UsageError
from megatron_smlp.platform import safe_loading
from megatron_smlp.training.checkpoints import read_model_flags

NOT_WEIGHTS = ("optimizer.", "rng_state", "rerun_state_machine_state", "common_state")


class TorchDistCheckpoint:
    """The weights of one saved iteration, whole tensors under global names.

    Raises:
        UsageError: there is no checkpoint in the folder, or not one of ours.
    """

    def __init__(self, folder: str | Path) -> None:
        safe_loading.apply()
        iteration = latest_iteration(folder)
        if iteration is None:
            raise UsageError(
                f"{folder} holds no checkpoint: latest_checkpointed_iteration.txt is missing. Give "
                "the --save folder of a run."
            )
        flags = read_model_flags(folder)
        if flags is None:
            raise UsageError(
                f"{iteration_folder(folder, iteration)} has no model.json, which "
                "pretrain_smlp.py writes beside each checkpoint."
            )
        self.iteration = iteration
        self.flags: dict[str, Any] = flags
        self.reader = FileSystemReader(str(iteration_folder(folder, iteration)))
        self.shapes: dict[str, TensorStorageMetadata] = {
            name: entry
            for name, entry in self.reader.read_metadata().state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not name.startswith(NOT_WEIGHTS)
        }

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """One weight at a time, in the order of their names."""
        for name in sorted(self.shapes):
            entry = self.shapes[name]
            box = {name: torch.empty(entry.size, dtype=entry.properties.dtype)}
            with safe_loading.plain_errors(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that one process loads alone is the intention
                dcp.load(box, storage_reader=self.reader, no_dist=True)
            yield name, box[name]
