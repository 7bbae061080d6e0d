"""Time us fairly against a peer: alternating calls, medians, one record per case."""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NotRequired, TypedDict


class Record(TypedDict):
    """One comparison. `ratio` is peer / ours: over 1 we are faster."""

    case: str
    ours_ms: float
    peer_ms: float
    ratio: float
    spread: NotRequired[tuple[float, float]]
    """Quartiles of the ratios of single pairs of calls."""
    unit: NotRequired[str]
    """Unit of the two figures, if it is not milliseconds."""


def _milliseconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e3


def compare(
    case: str, ours: Callable[[], object], peer: Callable[[], object], *, repeats: int
) -> Record:
    """Return medians over `repeats` alternating calls, after two uncounted calls of each.

    Alternation makes a slow phase of the machine affect both. The functions must leave nothing
    running: on a GPU they synchronize themselves.
    """
    for function in (ours, peer, ours, peer):
        function()
    pairs = [(_milliseconds(ours), _milliseconds(peer)) for _ in range(repeats)]
    return paired(case, *zip(*pairs, strict=True))


def paired(case: str, ours: Sequence[float], peer: Sequence[float]) -> Record:
    """Return the record of milliseconds measured in turns, at least two per side."""
    ours_ms, peer_ms = statistics.median(ours), statistics.median(peer)
    ratios = [theirs / own for own, theirs in zip(ours, peer, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Record(
        case=case, ours_ms=ours_ms, peer_ms=peer_ms, ratio=peer_ms / ours_ms, spread=(low, high)
    )


def quartiles(record: Record) -> str:
    """Return the spread as text; empty if a case was measured once."""
    return " to ".join(f"{ratio:.2f}" for ratio in record.get("spread", ()))


def report(records: list[Record], path: Path | None) -> None:
    """Print the records as a table, and write them as JSON where a path is given."""
    width = max(len(record["case"]) for record in records)
    print(f"{'case':{width}}  {'ours ms':>9}  {'peer ms':>9}  {'ratio':>6}  quartiles")
    for record in records:
        figures = f"{record['ours_ms']:9.2f}  {record['peer_ms']:9.2f}  {record['ratio']:6.2f}"
        extra = f"{quartiles(record)}  {record.get('unit', '')}"
        print(f"{record['case']:{width}}  {figures}  {extra}".rstrip())
    if path is not None:
        path.write_text(json.dumps(records, indent=2) + "\n")


def benchmark_parser(
    description: str | None, *, repeats: int, of: str = "calls per case and side"
) -> argparse.ArgumentParser:
    """Return a parser with --json, --repeats and --threads."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="write the records here")
    parser.add_argument("--repeats", type=int, default=repeats, help=of)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    return parser


def add_only(parser: argparse.ArgumentParser, cases: Iterable[str]) -> None:
    """Add --only, which selects cases: `arguments.cases` has their names, all by default."""
    names = list(cases)

    def chosen(only: str) -> list[str]:
        selected = [only] if only in names else [name for name in names if only in name]
        if not selected:
            raise argparse.ArgumentTypeError(f"{only}: no case holds this; the cases are {names}")
        return selected

    parser.add_argument(
        "--only", dest="cases", type=chosen, default=names, metavar="NAME",
        help="the case of this name, or else those whose names hold it",
    )  # fmt: skip
