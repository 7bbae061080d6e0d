"""Studies for the tests: a study file, and results that were never trained."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from support.launches import REPOSITORY

from megatron_smlp.study.fairness import check_fair
from megatron_smlp.study.figures import Drawing
from megatron_smlp.study.plan import PlannedRun, identity_of
from megatron_smlp.study.report import Page
from megatron_smlp.study.results import Results
from megatron_smlp.study.state import DIVERGED, DONE, State
from megatron_smlp.study.study_file import read_studies
from megatron_smlp.study.systems import read_systems

SMALL: dict[str, Any] = {
    "name": "small",
    "base": str(REPOSITORY / "configs" / "cpu"),
    "systems": ["transformer", "switch", "smlp_deterministic"],
    "subject": "smlp_deterministic",
    "paper": True,
    "vocab-size": 4096,
    "fixed": {"bf16": True, "eval-iters": 1, "global-batch-size": 8},
    "horizons": ["100K", "200K", "400K"],
    "seeds": [11, 12, 13],
}


def write_study(folder: Path, **changes: Any) -> Path:
    """Write SMALL with changed keys; None omits a key."""
    content = {key: value for key, value in {**SMALL, **changes}.items() if value is not None}
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def state_of(path: Path, *, runs: Path, **more: Any) -> State:
    """Read a study as tools/study.py does, on data that is not there."""
    _, [study] = read_studies(path)
    systems = read_systems(study, folder=path.parent)
    check_fair(study, systems)
    return State(
        study=study,
        file=path,
        systems=systems,
        identity=identity_of({}),
        folder=runs / study.name,
        kept=more.pop("kept", {}),
        **more,
    )


def study_argv(command: str, folder: Path, *more: str) -> list[str]:
    """Return arguments of tools/study.py for a folder's study, apart from the user's own data."""
    places = [f"--{name}={folder / name}" for name in ("runs", "results", "data")]
    return [command, str(folder / "study.yaml"), *places, *more]


def pretend(known: State, loss_of: Callable[[PlannedRun], float]) -> None:
    """End every run of a study with a loss, its curve logged, as if it had been trained."""
    for _ in range(2):  # the learning rates are chosen in between
        for run in known.plan().runs:
            if known.ending(run) is None:
                folder = known.folder_of(run)
                folder.mkdir(parents=True, exist_ok=True)
                loss = loss_of(run)
                write_metrics(folder, run, loss)
                status = DONE if math.isfinite(loss) else DIVERGED
                known.end(run, status=status, loss=str(loss) if run.horizon else None, attempts=1)


NOISE = {11: -0.002, 12: 0.003, 13: 0.0}


def loss_of(run: PlannedRun) -> float:
    """Return a loss 0.05 nats lower for sMLP than for the others; seeds differ by less."""
    ahead = 0.05 if run.system == "smlp_deterministic" else 0.0
    wobble = NOISE.get(run.seed, 0.0) * {"switch": 1, "transformer": 0.5}.get(run.system, -1)
    return 6.0 - 0.3 * math.log2((run.horizon or 10**5) / 10**5) - ahead + wobble


def page_of(known: State, folder: Path, **how: bool) -> Page:
    """Collect the runs that ended into the folder's results, and return their report."""
    results = Results(folder / "results")
    results.collect(known)
    return Page(known, results, **how)


def page_of_study(folder: Path, loss_of: Callable[[PlannedRun], float], **changes: Any) -> Page:
    """Return the report of SMALL with changed keys, whose runs end with these losses."""
    known = state_of(write_study(folder, **changes), runs=folder / "runs")
    pretend(known, loss_of)
    return page_of(known, folder)


def claims_and_text(known: State, folder: Path) -> tuple[dict[str, dict], str]:
    """Return report.json's claims, and report.md without the figures."""
    made = page_of(known, folder)
    return {claim["name"]: claim for claim in json.loads(made.json())["claims"]}, made.text()


def drawing(made: Page) -> Drawing:
    return Drawing(made.measured, made.plan.factors)


def write_metrics(folder: Path, run: PlannedRun, loss: float) -> None:
    """Write what a training that ends with this loss logs."""
    text = "".join(f"{json.dumps(record)}\n" for record in _records(run, loss))
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")


def _records(run: PlannedRun, loss: float) -> list[dict[str, Any]]:
    batch = run.flags["global_batch_size"] * run.flags["seq_length"]
    distance = run.flags["eval_interval"]
    records = []
    first = (run.start // distance + 1) * distance
    for iteration in range(first, run.end + 1, distance):
        above = 0.1 * (run.end - iteration) / run.end
        common = {"iteration": iteration, "consumed_tokens": iteration * batch}
        router = {"layer": 2, "load_share": [0.5, 0.5], "closed_rate": 0.25}
        router["drop_rate"] = 0.1 if run.horizon and iteration == run.end else 0.3
        step = {"loss": loss + above, "learning_rate": 1e-3, "tokens_per_second": 5000.0}
        step["routers"] = [router]
        evaluation = {
            "validation_loss": loss + above,
            "validation_suffix_loss": loss + above - 0.1,
            "validation_routers": [
                {"layer": 2, "load_share": [0.4, 0.6], "entropy": 0.97, "drop_rate": 0.0}
            ],
        }
        records += [common | step, common | evaluation]
    return records if math.isfinite(loss) else records[:1]
