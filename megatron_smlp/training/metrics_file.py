"""metrics.jsonl: what a run logged, an object a line. docs/metrics.md names every field."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any


class MetricsFile:
    """Written by one rank; a missing folder means that nothing is kept."""

    def __init__(self, folder: str | None) -> None:
        self.path = Path(folder) / "metrics.jsonl" if folder else None
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)

    def drop_after(self, iteration: int) -> dict[str, Any]:
        """Forget what a run wrote after the checkpoint that this run goes on from.

        Returns:
            the last record that stays; empty where there is none.
        """
        if self.path is None or not self.path.exists():
            return {}
        lines = self.path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if _iteration_of(line) <= iteration]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        partial.replace(self.path)
        last: dict[str, Any] = json.loads(kept[-1]) if kept else {}
        return last

    def write(self, record: dict[str, Any]) -> None:
        """Append a record; on a full disk it is lost, and the run lives on."""
        if self.path is None:
            return
        with contextlib.suppress(OSError), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({key: _finite(value) for key, value in record.items()}) + "\n")


def _iteration_of(line: str) -> float:
    try:
        return float(json.loads(line)["iteration"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # half a line, from a run that was killed while it wrote


def _finite(value: Any) -> Any:
    """JSON has no NaN: a number that is not finite is written as text."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
