"""Fingerprints: the losses and gradient norms of a system's first steps, to the bit, as a hash.

One is made before a system is trained by sources that it has none of, and where results of other
sources are kept, on this kind of machine with as many processes and threads: others round
differently, and can tell nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas

from megatron_smlp.durable import write_durably
from megatron_smlp.metrics_records import Record
from megatron_smlp.provenance import HASH_DIGITS
from megatron_smlp.study.data import StudyData
from megatron_smlp.study.hardware import hardware
from megatron_smlp.study.made_by import NOT_KNOWN, comparison
from megatron_smlp.study.metrics import SUFFIX_LOSS, VALIDATION_LOSS
from megatron_smlp.study.process import made_by_next, train_shortly
from megatron_smlp.study.results import FINGERPRINTS, FOUND, Results
from megatron_smlp.study.state import State

STEPS = 20
LOGGED = ("loss", "grad_norm", VALIDATION_LOSS, SUFFIX_LOSS)


def make_fingerprints(known: State, data: StudyData, results: Results, *, processes: int) -> None:
    """Make those that are asked for by what is to do and by what others made."""
    now = made_by_next(processes)
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    machine = f"{hardware()}, {processes} x {threads} threads"
    for name in _asked(known):
        about = {"system": name, "sources": now["sources"], "machine": machine}
        folder = known.folder / FINGERPRINTS / name / _digest(about)
        if (folder / FOUND).exists() or _is_in(results, about):
            continue
        lease = known.take(folder)
        if lease is None:  # another worker is making it
            continue
        with lease:
            code, records = train_shortly(
                known.systems[name], data, folder=folder, processes=processes, stop=lease.lost,
                train_iters=STEPS, log_interval=1, eval_interval=STEPS, eval_iters=1,
            )  # fmt: skip
            if not code:  # else the runs themselves will say why
                record = {
                    **about,
                    "commit": now["commit"],
                    "fingerprint": _digest(_logged(records)),
                }
                write_durably(folder / FOUND, json.dumps(record) + "\n")


def _is_in(results: Results, about: Mapping[str, Any]) -> bool:
    known = results.fingerprints
    return bool((known[list(about)] == pandas.Series(about)).all(axis=1).any())


def _logged(records: Sequence[Record]) -> list[list[Any]]:
    return [[record.get(name) for name in LOGGED] for record in records]


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:HASH_DIGITS]


def _asked(known: State) -> Iterator[str]:
    """Yield the systems that are to be trained, or were by sources that are known: others, or the
    present ones where a worker was killed at the fingerprint."""
    plan = known.plan()
    to_do = {run.system for run in (*known.to_do(plan), *plan.pending)}
    for name in known.systems:
        made_by = {known.made_by(run)["sources"] for run in plan.runs if run.system == name}
        if name in to_do or made_by - {NOT_KNOWN}:
            yield name


def lines_on_sources(known: State, results: Results, *, processes: int = 1) -> Iterator[str]:
    """Yield in words how many of the runs that are over were not made by the present sources."""
    now = made_by_next(processes)["sources"]
    fingerprints = results.fingerprints_of(known)
    over = [run for run in known.plan().runs if known.ending(run)]
    counts = Counter((run.system, *known.made_by(run).values()) for run in over)
    if unknown := sum(count for (*_, sources), count in counts.items() if not sources):
        yield f"by which sources is not known of {unknown} runs that are over"
    for (system, commit, sources), count in counts.items():
        for source in sources.split():
            if source != now:
                same = comparison(fingerprints, system, source, str(now))
                yield (
                    f"{count} runs of {system} that are over are of sources {source} (commit "
                    f"{commit or 'not known'}), not of {now}: {same}"
                )
