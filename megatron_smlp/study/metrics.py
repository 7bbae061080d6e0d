"""Read what a run of a study logged; see metrics_records.py."""

from __future__ import annotations

import math
from pathlib import Path

from megatron_smlp import metrics_records
from megatron_smlp.metrics_records import FILE_NAME, Record

VALIDATION_LOSS, SUFFIX_LOSS = "validation_loss", "validation_suffix_loss"
"""Names of the losses over all tokens, and over those behind the prefix of partial prediction."""


def read_records(folder: Path) -> list[Record]:
    """Return all records; none where the run has not begun."""
    file = folder / FILE_NAME
    return metrics_records.read_records(file) if file.exists() else []


def validation_at(folder: Path, iteration: int) -> Record | None:
    """Return the evaluation at an iteration; None: the run did not come so far."""
    values = [
        record
        for record in read_records(folder)
        if record["iteration"] == iteration and VALIDATION_LOSS in record
    ]
    return values[-1] if values else None


def last_step(folder: Path) -> tuple[int, float]:
    """Return iteration and loss of the last step that was logged; 0 and NaN before the first."""
    steps = [record for record in read_records(folder) if "loss" in record]
    return (steps[-1]["iteration"], float(steps[-1]["loss"])) if steps else (0, math.nan)
