"""By which sources the runs of a study were made, and which of them can be compared.

A run's folder notes the sources at each start of its training, runs.csv has them beside its key,
and fingerprints.csv what a system's first steps are under given sources on a given machine (see
fingerprints.py). Sources of which a system has one fingerprint on one machine are alike for it. All
runs that are compared must be such that one state of the sources could have made them all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas  # of an extra, which --help does without

NOTE = "made-by.jsonl"
NOT_KNOWN = ""
FINGERPRINT_COLUMNS = ("system", "commit", "sources", "machine", "fingerprint")


def note(folder: Path, made_by: Mapping[str, str | None]) -> None:
    """Note what a training is made by that is about to start."""
    with (folder / NOTE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(dict(made_by)) + "\n")


def noted(folder: Path) -> dict[str, str]:
    """Return commit and sources, each once with a space between where a run has several; empty
    where nobody noted them."""
    if not (folder / NOTE).exists():
        return {"commit": NOT_KNOWN, "sources": NOT_KNOWN}
    lines = [json.loads(line) for line in (folder / NOTE).read_text("utf-8").splitlines()]
    return {
        name: " ".join(dict.fromkeys(line[name] for line in lines if line[name]))
        for name in ("commit", "sources")
    }


def alike(fingerprints: pandas.DataFrame, system: str, sources: str) -> set[str]:
    """Return the sources that compute the same for a system, these among them."""
    own = fingerprints[fingerprints["system"] == system]
    reached: set[str] = set()
    more = {sources}
    while more > reached:
        reached = more
        same = own[own["sources"].isin(reached)][["machine", "fingerprint"]]
        more = reached | set(own.merge(same)["sources"])
    return reached


def listed(sources: object) -> list[str]:
    """Return the sources of a cell of runs.csv, or of `noted`."""
    return (sources.split() if isinstance(sources, str) else []) or [NOT_KNOWN]


@dataclass(frozen=True, kw_only=True)
class Versions:
    """The sources that most runs could have been made by, and the runs that they cannot."""

    sources: str
    others: pandas.DataFrame
    """Of runs.csv."""

    @classmethod
    def of(cls, runs: pandas.DataFrame, fingerprints: pandas.DataFrame) -> Versions:
        """Look at the runs that count; a trial only decided on a learning rate."""
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
    """Return the sources of a run and of those that it continues."""
    sources: list[str] = []
    while key in runs:
        sources += listed(runs[key]["sources"])
        key = runs[key]["parent"]
    return sources
