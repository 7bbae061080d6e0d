"""metrics.jsonl: what a run logged, an object a line.

reporting.py makes the lines; docs/metrics.md names every field.
"""

from __future__ import annotations

import json
import math
import os
from io import RawIOBase
from pathlib import Path
from typing import Any

from megatron_smlp.durable import write_durably
from megatron_smlp.metrics_records import FILE_NAME
from megatron_smlp.unwritable_log import UnwritableLog


class MetricsFile:
    """Written by one rank; a missing folder means that nothing is kept."""

    def __init__(self, folder: str | None) -> None:
        self.path = Path(folder) / FILE_NAME if folder else None
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.lost = UnwritableLog(self.path)

    def drop_after(self, iteration: int) -> dict[str, Any]:
        """Forget what a run wrote after the checkpoint that this run goes on from.

        Returns:
            the last record of a step that stays; empty where there is none.
        """
        before = self._text()
        kept = [line for line in before.splitlines() if _iteration_of(line) <= iteration]
        after = "".join(f"{line}\n" for line in kept)
        if self.path and after != before:
            with self.lost.tolerated():
                write_durably(self.path, after)
        records = map(json.loads, reversed(kept))  # Those of restarts have no wall time.
        return next((each for each in records if "wall_seconds" in each), {})

    def newest(self) -> tuple[int, float | None]:
        """Return the last iteration that was logged, 0 for none, and the seconds since, by the
        clock of the file system; None where there is no file."""
        if self.path is None or not self.path.exists():
            return 0, None
        numbers = [n for n in map(_iteration_of, self._text().splitlines()) if math.isfinite(n)]
        written = self.path.stat().st_mtime
        with self.lost.tolerated():
            self.path.touch()  # for the file system's own clock
            return int(max(numbers, default=0)), self.path.stat().st_mtime - written
        return int(max(numbers, default=0)), None

    def holds(self, prefix: str, *, iteration: int) -> bool:
        """Return whether a record of this iteration has a value whose name begins so."""
        return any(
            record["iteration"] == iteration and any(name.startswith(prefix) for name in record)
            for record in map(json.loads, self._text().splitlines())
        )

    def _text(self) -> str:
        if self.path is None or not self.path.exists():
            return ""
        return self.path.read_text(encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Append a record, whole or not at all; on a full disk it is lost, and the run lives on."""
        if self.path is None:
            return
        line = json.dumps({key: finite(value) for key, value in record.items()}) + "\n"
        with self.lost.tolerated(), self.path.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                _write_all(file, line.encode())
            except OSError:
                file.truncate(end)
                raise


def _write_all(file: RawIOBase, data: bytes) -> None:
    while data:
        data = data[file.write(data) :]


def _iteration_of(line: str) -> float:
    try:
        return float(json.loads(line)["iteration"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # half a line, from a run that was killed while it wrote


def finite(value: Any) -> Any:
    """Return what JSON can hold, which has no NaN: a number that is not finite as text."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
