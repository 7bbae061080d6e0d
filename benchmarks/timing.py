"""Fair timing of us against a peer: alternating calls, medians, one record a case."""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NotRequired, TypedDict


class Record(TypedDict):
    """One comparison. `ratio` is peer / ours: over 1 we are faster."""

    case: str
    ours_ms: float
    peer_ms: float
    ratio: float
    unit: NotRequired[str]
    """Of the two figures, where it is not milliseconds."""


def _milliseconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e3


def compare(
    case: str, ours: Callable[[], object], peer: Callable[[], object], *, repeats: int
) -> Record:
    """Medians over `repeats` alternating calls, after two of each that are not counted.

    Alternating makes a slow phase of the machine fall on both. The functions must leave nothing
    running: on a GPU they synchronise themselves.
    """
    for function in (ours, peer, ours, peer):
        function()
    pairs = [(_milliseconds(ours), _milliseconds(peer)) for _ in range(repeats)]
    ours_ms, peer_ms = (statistics.median(times) for times in zip(*pairs, strict=True))
    return Record(case=case, ours_ms=ours_ms, peer_ms=peer_ms, ratio=peer_ms / ours_ms)


def report(records: list[Record], path: Path | None) -> None:
    """Print the records as a table, and write them as JSON where a path is given."""
    width = max(len(record["case"]) for record in records)
    print(f"{'case':{width}}  {'ours ms':>9}  {'peer ms':>9}  {'ratio':>6}")
    for record in records:
        figures = f"{record['ours_ms']:9.2f}  {record['peer_ms']:9.2f}  {record['ratio']:6.2f}"
        print(f"{record['case']:{width}}  {figures}  {record.get('unit', '')}".rstrip())
    if path is not None:
        path.write_text(json.dumps(records, indent=2) + "\n")
