"""The results of a study that are kept in git: CSV files with one line per run or logged step."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas

from megatron_smlp.durable import write_durably
from megatron_smlp.metrics_records import Record
from megatron_smlp.study import state
from megatron_smlp.study.hardware import hardware
from megatron_smlp.study.made_by import FINGERPRINT_COLUMNS, NOT_KNOWN
from megatron_smlp.study.metrics import SUFFIX_LOSS, VALIDATION_LOSS, read_records
from megatron_smlp.study.plan import PlannedRun

ROOT = Path("studies/results")
LOSSES = (VALIDATION_LOSS, SUFFIX_LOSS)
RUN_COLUMNS = (
    *("key", "parent", "system", "phase", "factor", "lr", "seed", "horizon", "start", "end"),
    *("tokens", "status", "loss", *LOSSES, "reason"),
    *("attempts", "hardware", "commit", "sources", "logged_seconds", "tokens_per_second", "flags"),
)
CURVE_COLUMNS = (
    *("key", "iteration", "tokens", "flops", "square_flops", "learning_rate", "loss"),
    *(*LOSSES, "validation_prices_loss", "validation_greedy_loss"),
    *("load_min", "load_max", "entropy", "drop_rate", "closed_rate"),
)
MACHINE = ("hardware", "processes", "threads", "steps")
"""Conditions of a timing: rounds that differ in any of these are not combined."""
SPEED_COLUMNS = (
    *("system", "round", "seconds_per_iteration", "tokens_per_second", "tflops", "gemm_tflops"),
    *MACHINE,
)
EVALUATION_COLUMNS = ("key", "system", "seed", "kind", "label", "value", "stderr", "count")
FINGERPRINTS, FOUND = "fingerprints", "fingerprint.json"
"""A study's folder of fingerprints, and the file that each of them is in (fingerprints.py)."""
TASK, ROUTING, DOCUMENT = "task", "routing", "document"
"""Kinds of numbers in evaluations.csv, besides the other kinds of evaluation/breakdown.py. A
document's number is its bits per byte."""
OF_RUN = ("system", "phase", "factor", "seed", "horizon", "start", "end")
OF_ENDING = ("status", "loss", "reason", "attempts", "hardware")
RENAMED = {
    "consumed_tokens": "tokens",
    "consumed_flops": "flops",
    "consumed_square_flops": "square_flops",
}
SIGNIFICANT = "%.7g"
# Strings that may look like numbers.
TEXTS = ("key", "parent", "system", "commit", "sources", "fingerprint", "label")


class Results:
    """CSV files of one folder, and study.json beside them; a table is read anew at each use."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def runs(self) -> pandas.DataFrame:
        """One line per run that is over."""
        return self._read("runs.csv", RUN_COLUMNS)

    @property
    def curves(self) -> pandas.DataFrame:
        """One line per logged step or evaluation of such a run."""
        return self._read("curves.csv", CURVE_COLUMNS)

    @property
    def speed(self) -> pandas.DataFrame:
        """One line per system and round of the quiet timing."""
        return self._read("speed.csv", SPEED_COLUMNS)

    @property
    def evaluations(self) -> pandas.DataFrame:
        """One line per number that was measured on a final checkpoint; see study/final.py."""
        return self._read("evaluations.csv", EVALUATION_COLUMNS)

    @property
    def fingerprints(self) -> pandas.DataFrame:
        """One line per system, sources and machine for which a fingerprint was made."""
        return self._read("fingerprints.csv", FINGERPRINT_COLUMNS)

    def _read(self, name: str, columns: tuple[str, ...]) -> pandas.DataFrame:
        """Read a file; columns that are missing in files of earlier versions are left empty."""
        path = self.folder / name
        if not path.exists():
            return pandas.DataFrame(columns=list(columns))
        table = pandas.read_csv(path, dtype=dict.fromkeys(TEXTS, str))
        return table.reindex(columns=list(columns))

    def endings(self) -> dict[str, dict[str, Any]]:
        """Return how each run in runs.csv ended, by its hash."""
        return {
            line.key: {
                "status": line.status,
                "loss": None if pandas.isna(line.loss) else float(line.loss),
                "commit": line.commit,
                "sources": line.sources,
            }
            for line in self.runs.fillna({"commit": NOT_KNOWN, "sources": NOT_KNOWN}).itertuples()
        }

    def collect(self, known: state.State) -> None:
        """Add the finished runs that are missing here from their folders, and write the files."""
        if len(fingerprints := self.fingerprints_of(known)):
            self._write("fingerprints.csv", fingerprints)
        runs = self.runs
        kept = set(runs["key"][runs["status"] != state.FAILED])
        endings = {run.key: (run, known.ending(run)) for run in known.plan().runs}
        new = {
            key: (run, ending)
            for key, (run, ending) in endings.items()
            if ending is not None and key not in kept
        }
        if not new:
            return
        logged = [(run, ending, _records(known, run)) for run, ending in new.values()]
        self._add(
            known,
            [_run_line(known, *lines) for lines in logged],
            [line for run, _, records in logged for line in _curve_lines(run, records)],
        )

    def take_over(self, known: state.State, other: Results) -> int:
        """Add the runs of another study's results that this one trains too; return how many."""
        runs = {run.key: run for run in known.plan().runs if known.ending(run) is None}
        theirs = other.runs
        rows = theirs[theirs["key"].isin(runs) & (theirs["status"] != state.FAILED)]
        if rows.empty:
            return 0
        own_names = {row.system: runs[row.key].system for row in rows.itertuples()}
        lines = [
            row | {name: getattr(runs[row["key"]], name) for name in OF_RUN}
            for row in rows.to_dict("records")
        ]
        curves, prints = other.curves, other.fingerprints
        self._add(known, lines, curves[curves["key"].isin(rows["key"])])
        prints = prints[prints["system"].isin(own_names)]
        prints = prints.assign(system=prints["system"].map(own_names))
        self._write("fingerprints.csv", _merged(self.fingerprints, prints))
        return len(lines)

    def _add(
        self,
        known: state.State,
        runs: list[dict[str, Any]],
        curves: list[dict[str, Any]] | pandas.DataFrame,
    ) -> None:
        """Add runs and their curves, and write study.json beside them."""
        all_runs = _joined(self.runs, runs, RUN_COLUMNS).astype({"horizon": "Int64"})
        all_curves = _joined(self.curves, curves, CURVE_COLUMNS)
        # Sorted so that git diffs show what is new.
        order = ["phase", "system", "factor", "seed", "end", "key"]
        self._write("runs.csv", all_runs.sort_values(order))
        self._write("curves.csv", all_curves.sort_values(["key", "iteration"], kind="stable"))
        known.record(self.folder)

    def fingerprints_of(self, known: state.State) -> pandas.DataFrame:
        """Return the fingerprints in fingerprints.csv and those made since."""
        records = map(state.read_json, known.folder.glob(f"{FINGERPRINTS}/*/*/{FOUND}"))
        new = pandas.DataFrame(records, columns=list(FINGERPRINT_COLUMNS))
        return _merged(self.fingerprints, new)

    def add_speed(self, lines: list[dict[str, Any]]) -> None:
        """Append lines of a quiet timing, each a system's next round, to those of this machine.

        All of them count, so that nobody can choose among repeated timings. Only another machine
        (which need not be that of the runs) or another number of processes, threads or steps starts
        the file anew: the flags of a folder's systems never change (state.py). Remove speed.csv
        before timing other code.
        """
        new = pandas.DataFrame(lines).assign(hardware=hardware())
        new["round"] = new.groupby("system").cumcount() + 1
        before = self.speed
        before = before[(before[list(MACHINE)] == new[list(MACHINE)].iloc[0]).all(axis=1)]
        if len(before):
            new["round"] += int(before["round"].max())
            new = pandas.concat([before, new], ignore_index=True)
        self._write("speed.csv", new[list(SPEED_COLUMNS)])

    def add_evaluations(self, lines: list[dict[str, Any]]) -> None:
        """Add the numbers of one checkpoint, replacing those that it already has."""
        new = pandas.DataFrame(lines, columns=list(EVALUATION_COLUMNS))
        known = self.evaluations
        table = pandas.concat([known, new], ignore_index=True) if len(known) else new
        table = table.drop_duplicates(["key", "kind", "label"], keep="last")
        order = ["kind", "system", "seed"]
        self._write("evaluations.csv", table.sort_values(order, kind="stable"))

    def _write(self, name: str, table: pandas.DataFrame) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_durably(self.folder / name, table.to_csv(index=False, float_format=SIGNIFICANT))


def _merged(fingerprints: pandas.DataFrame, new: pandas.DataFrame) -> pandas.DataFrame:
    table = pandas.concat([fingerprints, new]) if len(fingerprints) else new
    order = ["system", "machine", "sources"]
    return table.drop_duplicates([*order, "fingerprint"]).sort_values(order)


def _joined(
    table: pandas.DataFrame,
    lines: list[dict[str, Any]] | pandas.DataFrame,
    columns: tuple[str, ...],
) -> pandas.DataFrame:
    """Append new lines, dropping older ones of the same runs."""
    new = pandas.DataFrame(lines, columns=list(columns))
    others = table[~table["key"].isin(new["key"])]
    return pandas.concat([others, new], ignore_index=True) if len(others) else new


def _records(known: state.State, run: PlannedRun) -> list[Record]:
    """Return what a run logged up to its end; a killed one may have trained beyond it."""
    records = read_records(known.folder_of(run))
    return [record for record in records if record["iteration"] <= run.end]


def _run_line(
    known: state.State, run: PlannedRun, ending: dict[str, Any], records: list[Record]
) -> dict[str, Any]:
    steps = pandas.Series([r["tokens_per_second"] for r in records if "tokens_per_second" in r])
    batch = run.flags["global_batch_size"] * run.flags["seq_length"]
    final = [r for r in records if r["iteration"] == run.end and VALIDATION_LOSS in r]
    return {
        "key": run.key,
        "parent": run.parent.key if run.parent else None,
        "lr": run.flags["lr"],
        **{name: getattr(run, name) for name in OF_RUN},
        "tokens": run.end * batch,
        **{name: ending.get(name) for name in OF_ENDING},
        **({name: final[-1].get(name) for name in LOSSES} if final else {}),
        **known.made_by(run),
        "logged_seconds": max((float(r.get("wall_seconds", 0)) for r in records), default=None),
        "tokens_per_second": steps.median() if len(steps) else None,
        "flags": json.dumps(dict(run.flags), sort_keys=True),
    }


def _curve_lines(run: PlannedRun, records: list[Record]) -> Iterator[dict[str, Any]]:
    for record in records:
        if "loss" not in record and VALIDATION_LOSS not in record:
            continue
        line = {RENAMED.get(name, name): value for name, value in record.items()}
        routers = record.get("validation_routers") or record.get("routers") or []
        loads = [
            share * len(router["load_share"])
            for router in routers
            for share in router["load_share"]
        ]
        line |= {"load_min": min(loads), "load_max": max(loads)} if loads else {}
        for name, worst in (("entropy", min), ("drop_rate", max), ("closed_rate", max)):
            values = [float(router[name]) for router in routers if router.get(name) is not None]
            line |= {name: worst(values)} if values else {}
        yield {"key": run.key, **{name: line.get(name) for name in CURVE_COLUMNS[1:]}}


def default_folder(name: str) -> Path:
    """Return studies/results/NAME/HARDWARE; not by the number of GPUs, as workers see their own."""
    return ROOT / name / re.sub(r"-\d+x-", "-", hardware())
