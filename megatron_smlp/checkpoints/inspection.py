"""Describe a checkpoint or compare two, one tensor at a time, without process groups."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_smlp.checkpoints import integrity
from megatron_smlp.checkpoints.folders import MODEL, is_ours, iteration_of
from megatron_smlp.checkpoints.reader import TorchDistReader
from megatron_smlp.checkpoints.run_record import read_run_record


def show(folder: Path) -> tuple[dict[str, Any], int]:
    """Return what `inspect_checkpoint.py show` prints, and its exit code."""
    record = read_run_record(folder) or {}
    answer = {
        "checkpoint": str(folder),
        "iteration": iteration_of(folder),
        "layout": record.get("layout"),
        "tokenizer": record.get("tokenizer"),
        "command_line": " ".join(record.get("command_line", [])) or None,
        "model": integrity.read_record(folder, MODEL),
        "tensors": list(tensor_rows(folder)),
    }
    return answer, 0


def diff(first: Path, second: Path) -> tuple[dict[str, Any], int]:
    """Return what `inspect_checkpoint.py diff` prints, and its exit code."""
    rows = list(differences(first, second))
    return {"checkpoints": [str(first), str(second)], "differences": rows}, int(bool(rows))


def verify(folder: Path) -> tuple[dict[str, Any], int]:
    """Return what `inspect_checkpoint.py verify` prints, and its exit code."""
    problems = integrity.verify(folder)
    answer = {"checkpoint": str(folder), "has_checksums": is_ours(folder), "problems": problems}
    return answer, int(bool(problems))


def tensor_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield name, shape, dtype and norms of each tensor."""
    tensors = TorchDistReader(folder)
    for name in tensors.all_specs:
        tensor = tensors.read(name)
        values = tensor.double()
        yield {
            "name": name,
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "norm": float(values.norm()),
            "max_abs": float(values.abs().max()) if values.numel() else 0.0,
        }


def differences(first: Path, second: Path) -> Iterator[dict[str, Any]]:
    """Yield a row for each tensor that differs between the two.

    `max_abs` is the largest elementwise difference, `relative` the norm of the difference over that
    of the first tensor (or of the second, if the first is zero).
    """
    ours, theirs = TorchDistReader(first), TorchDistReader(second)
    for name in sorted(ours.all_specs.keys() | theirs.all_specs.keys()):
        if name not in theirs.all_specs:
            yield {"name": name, "only_in": str(first)}
        elif name not in ours.all_specs:
            yield {"name": name, "only_in": str(second)}
        elif (specs := [side.all_specs[name] for side in (ours, theirs)])[0] != specs[1]:
            dtypes = [str(spec.dtype).removeprefix("torch.") for spec in specs]
            yield {"name": name, "shapes": [list(spec.shape) for spec in specs], "dtypes": dtypes}
        else:
            mine, other = ours.read(name), theirs.read(name)
            if not _is_same(mine, other):
                yield {"name": name, **_distance(mine.double(), other.double())}


def _is_same(mine: Tensor, other: Tensor) -> bool:
    """Return whether both are equal, by value or bit by bit: NaN does not equal itself."""
    return torch.equal(mine, other) or torch.equal(
        mine.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)
    )


def _distance(mine: Tensor, other: Tensor) -> dict[str, float]:
    gap = mine - other
    scale = float(mine.norm()) or float(other.norm())
    return {"max_abs": float(gap.abs().max()), "relative": float(gap.norm()) / scale}
