"""Track which sources produced the runs of a study, and which runs can therefore be compared.

A run's folder records the sources at each start of its training. runs.csv stores them with its key;
fingerprints.csv stores a system's first steps under given sources on a given machine (see
fingerprints.py). Sources that give a system the same fingerprint on one machine are alike for it.
Runs can be compared only if a single version of the sources could have produced all of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas  # an optional extra that --help does not need

NOTE = "made-by.jsonl"
NOT_KNOWN = ""
FINGERPRINT_COLUMNS = ("system", "commit", "sources", "machine", "fingerprint")


def note(folder: Path, made_by: Mapping[str, str | None]) -> None:
    """Append the commit and sources of a training that is about to start to its folder's notes."""
    with (folder / NOTE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(dict(made_by)) + "\n")


def noted(folder: Path) -> dict[str, str]:
    """Return a run's commit and sources, each without repeats and separated by spaces if there are
    several; empty if none were noted."""
    if not (folder / NOTE).exists():
        return {"commit": NOT_KNOWN, "sources": NOT_KNOWN}
    lines = [json.loads(line) for line in (folder / NOTE).read_text("utf-8").splitlines()]
    return {
        name: " ".join(dict.fromkeys(line[name] for line in lines if line[name]))
        for name in ("commit", "sources")
    }


def alike(fingerprints: pandas.DataFrame, system: str, sources: str) -> set[str]:
    """Return all sources that compute the same as `sources` for a system, including itself."""
    own = fingerprints[fingerprints["system"] == system]
    reached: set[str] = set()
    more = {sources}
    while more > reached:
        reached = more
        same = own[own["sources"].isin(reached)][["machine", "fingerprint"]]
        more = reached | set(own.merge(same)["sources"])
    return reached


def listed(sources: object) -> list[str]:
    """Split the sources in a cell of runs.csv, or from `noted`, into a list."""
    return (sources.split() if isinstance(sources, str) else []) or [NOT_KNOWN]


@dataclass(frozen=True, kw_only=True)
class Versions:
    """The sources that could have produced the most runs, and the runs that they could not."""

    sources: str
    others: pandas.DataFrame
    """Lines of runs.csv."""

    @classmethod
    def of(cls, runs: pandas.DataFrame, fingerprints: pandas.DataFrame) -> Versions:
        """Consider only main runs, since a trial merely decides on a learning rate."""
        main = runs[runs["phase"] == "main"]
        by_key = {line["key"]: line for _, line in runs.iterrows()}
        alike_to = cache(partial(alike, fingerprints))
        possible = {
            key: set.intersection(
                *(alike_to(by_key[key]["system"], source) for source in _all_of(by_key, key))
            )
            for key in main["key"]
        }
        every = sorted(set().union(*possible.values())) or [NOT_KNOWN]
        most = max(
            every, key=lambda candidate: sum(candidate in some for some in possible.values())
        )
        others = [key for key, some in possible.items() if most not in some]
        return cls(sources=most, others=main[main["key"].isin(others)])


def _all_of(runs: Mapping[str, pandas.Series], key: str) -> Sequence[str]:
    """Return the sources of a run and of all runs that it continues."""
    sources: list[str] = []
    while key in runs:
        sources += listed(runs[key]["sources"])
        key = runs[key]["parent"]
    return sources
