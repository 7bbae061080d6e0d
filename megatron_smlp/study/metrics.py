"""Read what a run of a study logged; see metrics_records.py."""

from __future__ import annotations

import json
import math
from pathlib import Path

from megatron_smlp import metrics_records
from megatron_smlp.metrics_records import FILE_NAME, Record

VALIDATION_LOSS, SUFFIX_LOSS = "validation_loss", "validation_suffix_loss"
"""Names of the losses over all tokens, and over those after the prefix of partial prediction."""
TAIL_BYTES = 1 << 16


def read_records(folder: Path) -> list[Record]:
    """Return all records; none if the run has not begun."""
    file = folder / FILE_NAME
    return metrics_records.read_records(file) if file.exists() else []


def validation_at(folder: Path, iteration: int) -> Record | None:
    """Return the evaluation at an iteration; None if the run did not get that far."""
    values = [
        record
        for record in read_records(folder)
        if record["iteration"] == iteration and VALIDATION_LOSS in record
    ]
    return values[-1] if values else None


def last_step(folder: Path) -> tuple[int, float]:
    """Return iteration and loss of the last logged step; 0 and NaN before the first.

    Reads only the end of the file, since it is called once a second.
    """
    file = folder / FILE_NAME
    if not file.exists():
        return 0, math.nan
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - TAIL_BYTES))
        lines = stream.read().splitlines()
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:  # a partial line, at either end
            continue
        if "loss" in record:
            return record["iteration"], float(record["loss"])
    return 0, math.nan
