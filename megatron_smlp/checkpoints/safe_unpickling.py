"""Unpickle plain data alone: what a checkpoint holds is read, and never run.

A distributed checkpoint holds pickles of three kinds: its index `.metadata`, objects and tensors.
A pickle can call anything when it is loaded. `load_metadata` builds the classes of ALLOWED alone,
and `load_object` what torch's `weights_only` allows, which Megatron adds its own classes to
(megatron.core.safe_globals). What is refused, and what cannot be read, is one line for the user:
UnsafeCheckpointError and DamagedCheckpointError.
"""

from __future__ import annotations

import contextlib
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from megatron_smlp.errors import DamagedCheckpointError, UnsafeCheckpointError, UserError
from megatron_smlp.signals import is_interruption

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


class MetadataUnpickler(pickle.Unpickler):
    """Builds the classes of ALLOWED and torch's dtypes, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        module = "pathlib" if module == "pathlib._local" else module  # its name in Python 3.13
        if (module, name) in ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")


def load_metadata(file: IO[bytes]) -> Metadata:
    """Return the index of a distributed checkpoint, from its `.metadata`.

    Raises:
        pickle.UnpicklingError: it asks for a class that is not allowed.
    """
    metadata: Metadata = MetadataUnpickler(file).load()
    return metadata


def read_index(folder: Path) -> Metadata:
    """Return the index of the checkpoint in a folder.

    Raises:
        UserError: it is missing or damaged, or would run code.
    """
    path = folder / ".metadata"
    with readable(path), path.open("rb") as file:
        return load_metadata(file)


def load_object(file: str | Path | IO[bytes]) -> Any:
    """Return what torch saved in a file, where it is of types that `weights_only` allows."""
    from megatron.core import safe_globals  # noqa: F401  (whose import allows Megatron's classes)

    with torch.serialization.safe_globals([frozenset]):  # plain data, but not torch's idea of it
        return torch.load(file, map_location="cpu", weights_only=True)


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Name the file in what goes wrong while it is read.

    Raises:
        UnsafeCheckpointError: it asks for code to be run.
        DamagedCheckpointError: it cannot be read.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # of torch, of its zip reader, of what unpickling builds
        if is_interruption(error):
            raise KeyboardInterrupt from error
        raise _explained(path, error) from error


def _explained(path: Path, error: BaseException) -> UserError:
    text = " ".join(str(error).split())
    unsafe = re.search(r"GLOBAL ([\w.]+)", text)
    if unsafe and isinstance(error, pickle.UnpicklingError):
        return UnsafeCheckpointError(
            f"{path} asks to run {unsafe[1]} while it is loaded, which a checkpoint has no need "
            "of: refused, and nothing was run. Get the checkpoint from who made it, or delete it."
        )
    reason = text.split(". ")[0][:200] or type(error).__name__
    return DamagedCheckpointError(f"{path} cannot be read ({reason}): the file is damaged.")
