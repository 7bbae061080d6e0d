"""The final checkpoints of a study: zero-shot tasks, where in a text the loss lies, and exports.

Every line of evaluations.csv is one number of one checkpoint: of a task, of a kind of token, or of
another way to route tokens.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas

from megatron_smlp.errors import UsageError
from megatron_smlp.evaluation.reports import PAPER_METRICS
from megatron_smlp.plugin_texts import FLAG
from megatron_smlp.progress import Progress
from megatron_smlp.study.data import StudyData
from megatron_smlp.study.plan import PlannedRun
from megatron_smlp.study.process import last_lines, plugin_paths, run_command
from megatron_smlp.study.results import DOCUMENT, ROUTING, TASK, Results
from megatron_smlp.study.state import CHECKPOINTS, State

WINDOWS = 2000
"""Windows of the validation documents that are scored for the breakdown."""

Line = dict[str, Any]


def evaluate_finals(
    known: State,
    data: StudyData,
    results: Results,
    *,
    tasks: Sequence[str],
    data_dir: Path | None,
) -> list[Path]:
    """Evaluate what has come to the longest horizon; return the folders of what was new.

    What is in evaluations.csv is not done again: the text of a checkpoint, and each of its tasks.
    A task is scored by all of its examples, for one that is known by some would count as scored.

    Args:
        tasks: of lm-evaluation-harness; none: only the loss is looked at.
        data_dir: local files of the tasks; None: from the hub.

    Raises:
        UsageError: an evaluation failed.
    """
    finals = [run for run in known.plan().runs if _is_final(known, run)]
    missing = [(run, what_is_missing(results.evaluations, run.key, tasks)) for run in finals]
    left = [(run, what) for run, what in missing if any(what)]
    with Progress(len(left)) as progress:
        for number, (run, (text, named)) in enumerate(left):
            counted = f"{number} of {len(left)} checkpoints; {run.title}"
            watch = partial(progress.show, number, counted)
            lines = list(_of_text(known, run, data, watch)) if text else []
            if named:
                lines += _of_tasks(known, run, watch, tasks=named, data_dir=data_dir)
            about = {"key": run.key, "system": run.system, "seed": run.seed}
            results.add_evaluations([about | line for line in lines])
    return [known.folder_of(run) for run, _ in left]


def what_is_missing(
    evaluations: pandas.DataFrame, key: str, tasks: Sequence[str]
) -> tuple[bool, list[str]]:
    """Return whether a checkpoint's text has to be looked at, and which of the tasks."""
    known = evaluations[evaluations["key"] == key]
    scored = set(known["label"][known["kind"] == TASK])
    text = not (known["kind"] == ROUTING).any()
    return text, [task for task in tasks if task not in scored]


def _is_final(known: State, run: PlannedRun) -> bool:
    is_last = run.phase == "main" and run.horizon == known.study.longest
    return is_last and known.has_checkpoint(run)


def export_best(known: State, system: str, folder: Path, more: Sequence[str]) -> None:
    """Write the final checkpoint of a system with the lowest loss, as one for transformers.

    Args:
        more: words for tools/convert_checkpoint.py.

    Raises:
        UsageError: none of its runs to the longest horizon has a checkpoint on this machine, or
            the folder is not empty.
    """
    from megatron_smlp.conversion import cli

    if system not in known.systems:
        raise UsageError(
            f"--systems {system}: not in the study, which has {', '.join(known.systems)}."
        )
    finals = [r for r in known.plan().runs if r.system == system and _is_final(known, r)]
    if not finals:
        raise UsageError(
            f"{system} has no checkpoint at the longest horizon in {known.folder}: train it here "
            "by `tools/study.py run`, or give the --runs folder that has it."
        )
    best = min(finals, key=lambda run: float((known.ending(run) or {})["loss"]))
    load = known.folder_of(best) / CHECKPOINTS
    cli.main(["--load", str(load), "--save", str(folder), "--to", "hf", *more])


def _of_text(
    known: State, run: PlannedRun, data: StudyData, watch: Callable[[], None]
) -> Iterator[Line]:
    flags = ["--data-path", data.prefix("valid"), "--limit", str(WINDOWS)]
    scores = _evaluated(known, run, [*flags, "--breakdown"], watch, name="text")
    for kind, bins in scores["breakdown"].items():
        for row in bins:
            if kind == DOCUMENT:
                if row.get("bytes"):
                    yield _line(kind, row["label"], row["bits_per_byte"], count=row["bytes"])
                continue
            error = row["sd"] / row["tokens"] ** 0.5
            yield _line(kind, row["label"], row["loss"], stderr=error, count=row["tokens"])
    priced = run.flags.get("base_gate") == "price"
    rule = "prices" if priced else run.flags.get("base_eval", "greedy")
    yield _line(ROUTING, rule, scores["nll"] / scores["tokens"], count=scores["tokens"])
    if run.flags.get("token_router") == "base" and not priced:
        other = "prices" if rule == "greedy" else "greedy"
        scores = _evaluated(known, run, [*flags, "--base-eval", other], watch, name="routing")
        yield _line(ROUTING, other, scores["nll"] / scores["tokens"], count=scores["tokens"])


def _of_tasks(
    known: State,
    run: PlannedRun,
    watch: Callable[[], None],
    *,
    tasks: Sequence[str],
    data_dir: Path | None,
) -> Iterator[Line]:
    flags = ["--tasks", ",".join(tasks)]
    flags += ["--data-dir", str(data_dir)] if data_dir else []
    for task, scores in _evaluated(known, run, flags, watch, name="tasks")["results"].items():
        metric = PAPER_METRICS.get(task) or next(iter(scores["metrics"]))
        score = scores["metrics"][metric]
        yield _line(TASK, task, score["value"], stderr=score["stderr"], count=scores["examples"])


def _line(kind: str, label: str, value: float, *, count: int, stderr: float | None = None) -> Line:
    return {"kind": kind, "label": label, "value": value, "stderr": stderr, "count": count}


def _evaluated(
    known: State, run: PlannedRun, flags: Sequence[str], watch: Callable[[], None], *, name: str
) -> Any:
    """Return what tools/evaluate.py writes with these words.

    Args:
        watch: called about once a second.
    """
    folder = known.folder_of(run) / f"evaluation-{name}"
    folder.mkdir(exist_ok=True)
    output = folder / "result.json"
    command = [
        *(sys.executable, "-c", "from megatron_smlp.commands import evaluate; evaluate()"),
        *("--checkpoint", str(known.folder_of(run) / CHECKPOINTS)),
        *(*flags, "--output", str(output)),
        *(f"{FLAG}={path}" for path in plugin_paths(run.flags)),
    ]
    code = run_command(command, folder=folder, stop=threading.Event(), watch=watch)
    if code:
        text = "\n".join(f"  {line}" for line in last_lines(folder))
        raise UsageError(f"evaluating {run.title} failed ({code}), {folder}:\n{text}")
    return json.loads(output.read_text(encoding="utf-8"))
