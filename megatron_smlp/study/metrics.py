"""Read what a run of a study logged: metrics.jsonl, as tables."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_smlp.training.metrics_file import FILE_NAME


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Return all whole lines; none where the run has not begun."""
    try:
        lines = (folder / FILE_NAME).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    return list(_parsed(lines))


def _parsed(lines: list[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:  # half a line, of a run that was killed
            continue


def validation_at(folder: Path, iteration: int) -> dict[str, Any] | None:
    """Return the evaluation at an iteration; None: the run did not come so far."""
    found = [
        record
        for record in read_records(folder)
        if record["iteration"] == iteration and "validation_loss" in record
    ]
    return found[-1] if found else None


def last_step(folder: Path) -> tuple[int, float]:
    """Return iteration and loss of the last step that was logged; 0 and NaN before the first."""
    steps = [record for record in read_records(folder) if "loss" in record]
    return (steps[-1]["iteration"], float(steps[-1]["loss"])) if steps else (0, math.nan)
