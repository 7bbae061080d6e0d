"""Read metrics.jsonl of one or more runs, in the order of their iterations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_smlp.errors import UsageError
from megatron_smlp.metrics_records import FILE_NAME, Record, read_records


@dataclass(frozen=True)
class Run:
    label: str
    training: list[Record]
    """Lines with a `loss`, one an iteration, ascending."""
    validation: list[Record]
    """Lines with a `validation_loss`, likewise."""


def read_runs(paths: Sequence[Path], *, labels: Sequence[str] | None = None) -> list[Run]:
    """Read the runs in these folders or files.

    Args:
        labels: one a run; default: the part in which their paths differ.

    Raises:
        UsageError: another number of labels, or an error of `read_run`.
    """
    names = list(labels) if labels else default_labels(paths)
    if len(names) != len(paths):
        raise UsageError(f"--labels {' '.join(names)}: give one for each of the {len(paths)} runs.")
    return [read_run(path, label=label) for path, label in zip(paths, names, strict=True)]


def default_labels(paths: Sequence[Path]) -> list[str]:
    """Return the part in which paths differ: `switch`, `base` of `switch/log base/log`."""
    folders = [(path.parent if path.suffix == ".jsonl" else path).resolve() for path in paths]
    for part in range(1, max(len(folder.parts) for folder in folders)):
        names = [folder.parts[-part] if part < len(folder.parts) else "" for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def read_run(path: Path, *, label: str) -> Run:
    """Read one run.

    Raises:
        UsageError: no such file, a line that is not a record, or no step in it.
    """
    file = path / FILE_NAME if path.is_dir() else path
    present = read_records(file)
    training, validation = (_by_iteration(present, name) for name in ("loss", "validation_loss"))
    if not training:
        raise UsageError(f"{file}: no training step is recorded in it: nothing can be drawn.")
    return Run(label, training, validation)


def _by_iteration(records: Sequence[Record], name: str) -> list[Record]:
    """Return the records that have this number, the last one of each iteration."""
    return list({record["iteration"]: record for record in records if name in record}.values())


def number(record: Record, name: str) -> float:
    """Return a field as a number, also from a text such as "nan"; NaN where it is missing."""
    value = record.get(name)
    return math.nan if value is None else float(value)
