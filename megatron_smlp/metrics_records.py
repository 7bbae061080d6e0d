"""Read the records of a metrics.jsonl, an object a line (docs/metrics.md), without overlap.

A run that was stopped and went on, or was copied behind another part of it, has iterations twice:
the later line is of the model that trained on, and replaces the earlier ones from its iteration on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_smlp.errors import UsageError

FILE_NAME = "metrics.jsonl"
Record = dict[str, Any]


def read_records(file: Path) -> list[Record]:
    """Read all records of a file, without those that a later line replaces.

    Raises:
        UsageError: no such file, or a line that is not a record.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise UsageError(
            f"{file}: {reason}: give a folder that --log-dir or --save named, or a {FILE_NAME}."
        ) from error
    records = [
        _parse(line, where=f"{file}:{number}", is_last=number == len(lines))
        for number, line in enumerate(lines, start=1)
    ]
    return _without_overlap([record for record in records if record])


def _parse(line: str, *, where: str, is_last: bool) -> Record:
    """Return a line's record; empty if blank, or half a line at the end of a running run."""
    if not line.strip():
        return {}
    try:
        record = json.loads(line)
    except ValueError as error:
        if is_last:
            return {}
        raise UsageError(f"{where}: not a JSON object: remove the line.") from error
    if not (isinstance(record, dict) and isinstance(record.get("iteration"), int)):
        raise UsageError(f"{where}: a JSON object with an integer `iteration` is expected.")
    return record


def _without_overlap(records: Sequence[Record]) -> list[Record]:
    """Let each record drop earlier ones of later iterations, and a step those of its own."""
    kept: list[Record] = []
    for record in records:
        reached = record["iteration"] - ("loss" in record)  # a validation follows the step
        while kept and kept[-1]["iteration"] > reached:
            kept.pop()
        kept.append(record)
    return kept
