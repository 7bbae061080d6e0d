"""Writes and reads metrics.jsonl, a run's log with one object per line (docs/metrics.md).

If a run was resumed, or one part's log was appended to another's, some iterations occur twice: the
later line is of the model that trained on, and replaces the earlier ones from its iteration on.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_smlp.durable import write_durably
from megatron_smlp.errors import UsageError
from megatron_smlp.unwritable_log import UnwritableLog

FILE_NAME = "metrics.jsonl"
DROPPED = f"{FILE_NAME}.dropped"
HEAD = re.compile(r'\{"iteration": (\d+)[,}]')
Record = dict[str, Any]


class MetricsFile:
    """The file as one rank of a run writes it; without a folder, nothing is kept."""

    def __init__(self, folder: str | None) -> None:
        self.path = Path(folder) / FILE_NAME if folder else None
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.lost = UnwritableLog(self.path)

    def drop_after(self, iteration: int) -> Record:
        """Move what was written after the checkpoint from which this run resumes to DROPPED.

        Returns:
            the last remaining record of a step; empty if there is none.
        """
        kept: list[str] = []
        dropped: list[str] = []
        for line in self._text().splitlines():
            (kept if _iteration_of(line) <= iteration else dropped).append(line)
        if self.path and dropped:
            with self.lost.tolerated():
                with self.path.with_name(DROPPED).open("a", encoding="utf-8") as file:
                    file.writelines(f"{line}\n" for line in dropped)
                write_durably(self.path, "".join(f"{line}\n" for line in kept))
        records = map(json.loads, reversed(kept))  # records of restarts have no wall time
        return next((record for record in records if "wall_seconds" in record), {})

    def newest(self) -> int:
        """Return the last logged iteration; 0 if there is none."""
        numbers = map(_iteration_of, self._text().splitlines())
        return int(max(filter(math.isfinite, numbers), default=0))

    def fields_at(self, iteration: int) -> set[str]:
        """Return the fields of all records of this iteration."""
        lines = (line for line in self._text().splitlines() if _iteration_of(line) == iteration)
        return {name for line in lines for name in json.loads(line)}

    def write(self, record: Record) -> None:
        """Append a record, all or nothing; on a full disk it is lost, and the run continues."""
        if self.path is None:
            return
        data = (json.dumps(finite(record)) + "\n").encode()
        with self.lost.tolerated(), self.path.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                while data:
                    data = data[file.write(data) :]
            except OSError:
                file.truncate(end)
                raise

    def _text(self) -> str:
        if self.path is None or not self.path.exists():
            return ""
        return self.path.read_text(encoding="utf-8")


def _iteration_of(line: str) -> float:
    """Return a record's iteration; infinity for a partial line, of a run that was killed while
    writing."""
    head = HEAD.match(line)
    # Parsing each line of a long run with many experts takes minutes, while all ranks wait.
    if head and line.endswith("}") and line.count("{") == line.count("}"):
        return float(head[1])
    try:
        return float(json.loads(line)["iteration"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def finite(value: Any) -> Any:
    """Return a value that JSON can hold: non-finite numbers become text, as JSON has no NaN."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read_records(file: Path) -> list[Record]:
    """Read all records of a file except those that a later line replaces.

    Raises:
        UsageError: there is no such file, or a line is not a record.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise UsageError(
            f"{file}: {reason}: give a run's --log-dir or --save folder, or a {FILE_NAME}."
        ) from error
    records = [
        _parse(line, where=f"{file}:{number}", is_last=number == len(lines))
        for number, line in enumerate(lines, start=1)
    ]
    return _without_overlap([record for record in records if record])


def _parse(line: str, *, where: str, is_last: bool) -> Record:
    """Return a line's record; empty if it is blank, or the partial last line of a running run."""
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
    """Let each record drop earlier ones of later iterations, and a step also those of its own."""
    kept: list[Record] = []
    for record in records:
        reached = record["iteration"] - ("loss" in record)  # a validation follows the step
        while kept and kept[-1]["iteration"] > reached:
            kept.pop()
        kept.append(record)
    return kept
