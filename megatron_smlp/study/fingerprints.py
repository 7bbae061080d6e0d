"""Fingerprints: a hash of the bit-exact losses and gradient norms of a system's first steps.

While runs are left to train, one is made for each system that has none yet for the current sources,
this kind of machine, and this number of processes and threads. Fingerprints from other setups round
differently, so that they say nothing here.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import pandas

from megatron_smlp.durable import write_durably
from megatron_smlp.provenance import HASH_DIGITS
from megatron_smlp.study.data import StudyData
from megatron_smlp.study.hardware import hardware
from megatron_smlp.study.made_by import alike, listed
from megatron_smlp.study.metrics import SUFFIX_LOSS, VALIDATION_LOSS
from megatron_smlp.study.process import made_by_next, train_shortly
from megatron_smlp.study.results import FINGERPRINTS, FOUND, Results
from megatron_smlp.study.state import State

STEPS = 20
LOGGED = ("loss", "grad_norm", VALIDATION_LOSS, SUFFIX_LOSS)


def make_fingerprints(known: State, data: StudyData, results: Results, *, processes: int) -> None:
    """Make the missing fingerprints, so that runs of these sources can be compared with others."""
    now = made_by_next(processes)
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    machine = f"{hardware()}, {processes} x {threads} threads"
    plan = known.plan()
    for name in known.systems if known.to_do(plan) or plan.pending else ():
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
            if not code:  # on failure, the runs themselves will say why
                logged = [[record.get(name) for name in LOGGED] for record in records]
                content = {**about, "commit": now["commit"], "fingerprint": _digest(logged)}
                write_durably(folder / FOUND, json.dumps(content) + "\n")


def _is_in(results: Results, about: Mapping[str, Any]) -> bool:
    known = results.fingerprints
    return bool((known[list(about)] == pandas.Series(about)).all(axis=1).any())


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:HASH_DIGITS]


def lines_on_sources(known: State, results: Results, *, processes: int = 1) -> Iterator[str]:
    """Yield a note on how many finished runs have sources that may compute other results now."""
    now = str(made_by_next(processes)["sources"])
    fingerprints = results.fingerprints_of(known)
    same = {name: alike(fingerprints, name, now) for name in known.systems}
    others = Counter(
        run.system
        for run in known.plan().runs
        if known.ending(run) and not {*listed(known.made_by(run)["sources"])} <= same[run.system]
    )
    if others:
        runs = ", ".join(f"{count} of {name}" for name, count in others.items())
        yield f"note: finished runs of sources that may compute differently from {now}: {runs}"
