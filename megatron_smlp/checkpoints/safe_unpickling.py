"""Unpickle plain data only: the content of a checkpoint is read, and never run.

A distributed checkpoint holds three kinds of pickles: its index `.metadata`, objects and tensors.
A pickle can call anything when it is loaded. `load_metadata` builds only the classes in ALLOWED,
and `load_object` only what torch's `weights_only` allows, to which Megatron adds classes of its own
(megatron.core.safe_globals). What is refused or cannot be read raises a one-line error for the
user: UnsafeCheckpointError or DamagedCheckpointError.
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

# Everything that torch and Megatron put into `.metadata`; calling these only builds data.
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
    """An unpickler that builds the classes in ALLOWED and torch's dtypes, and nothing else."""

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
    """Return what torch saved in a file, if `weights_only` allows its types."""
    from megatron.core import safe_globals  # noqa: F401  (whose import allows Megatron's classes)

    with torch.serialization.safe_globals([frozenset]):  # plain data that torch does not allow
        return torch.load(file, map_location="cpu", weights_only=True)


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Name the file in errors that occur while it is read.

    Raises:
        UnsafeCheckpointError: it asks to run code.
        DamagedCheckpointError: it cannot be read.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # from torch, its zip reader, or what unpickling builds
        if is_interruption(error):
            raise KeyboardInterrupt from error
        raise _explained(path, error) from error


def _explained(path: Path, error: BaseException) -> UserError:
    text = " ".join(str(error).split())
    unsafe = re.search(r"GLOBAL ([\w.]+)", text)
    if unsafe and isinstance(error, pickle.UnpicklingError):
        return UnsafeCheckpointError(
            f"{path} would run {unsafe[1]} when loaded, which no checkpoint needs: refused, and "
            "nothing was run. Get the checkpoint from its author, or delete it."
        )
    reason = text.split(". ")[0][:200] or type(error).__name__
    return DamagedCheckpointError(f"{path} cannot be read ({reason}): the file is damaged.")
