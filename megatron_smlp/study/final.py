"""Evaluate a study's final checkpoints (zero-shot tasks, loss by kind of token), and export them.

Each line of evaluations.csv is one number of one checkpoint: for a task, a kind of token, a
document, or a rule of routing tokens.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
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
"""Number of windows of the validation documents to score for the breakdown."""

SHARES = ("acc", "acc_norm", "em", "exact_match", "f1")
"""The harness's metrics that are a share of right answers."""
Line = dict[str, Any]


def evaluate_finals(
    known: State,
    data: StudyData,
    results: Results,
    *,
    tasks: Sequence[str],
    data_dir: Path | None,
) -> int:
    """Evaluate runs that reached the longest horizon; return how many of them were new.

    Skip what is already in evaluations.csv: the text of a checkpoint, and each of its tasks. Tasks
    are scored on all of their examples, since one scored on a subset would count as done.

    Args:
        tasks: tasks of lm-evaluation-harness; if empty, only the loss is evaluated.
        data_dir: local files of the tasks; None loads them from the Hub.

    Raises:
        UsageError: an evaluation failed.
    """
    finals = [run for run in known.plan().runs if _is_final(known, run)]
    known_already = results.evaluations
    missing = [(run, what_is_missing(known_already, run.key, tasks)) for run in finals]
    left = [(run, what) for run, what in missing if any(what)]
    with Progress(len(left)) as progress:
        for number, (run, (text, named)) in enumerate(left):
            progress.show(number, f"{number} of {len(left)} checkpoints; {run.title}")
            lines = list(_of_text(known, run, data)) if text else []
            if named:
                lines += _of_tasks(known, run, tasks=named, data_dir=data_dir)
            about = {"key": run.key, "system": run.system, "seed": run.seed}
            results.add_evaluations([about | line for line in lines])
    return len(left)


def what_is_missing(
    evaluations: pandas.DataFrame, key: str, tasks: Sequence[str]
) -> tuple[bool, list[str]]:
    """Return whether a checkpoint's text remains to be scored, and which of the tasks do."""
    known = evaluations[evaluations["key"] == key]
    scored = set(known["label"][known["kind"] == TASK])
    text = not (known["kind"] == ROUTING).any()
    return text, [task for task in tasks if task not in scored]


def _is_final(known: State, run: PlannedRun) -> bool:
    is_last = run.phase == "main" and run.horizon == known.study.longest
    return is_last and known.has_checkpoint(run)


def export_best(known: State, system: str, folder: Path, more: Sequence[str]) -> None:
    """Convert a system's final checkpoint with the lowest loss to Hugging Face's format.

    Args:
        more: further arguments of tools/convert_checkpoint.py.

    Raises:
        UsageError: none of its runs to the longest horizon has a checkpoint on this machine, or
            the folder is not empty.
    """
    from megatron_smlp.conversion import cli

    finals = [r for r in known.plan().runs if r.system == system and _is_final(known, r)]
    if not finals:
        raise UsageError(
            f"{system} has no checkpoint at the longest horizon in {known.folder}: train it "
            "with `tools/study.py run`, or give the --runs folder that has it."
        )
    best = min(finals, key=lambda run: float((known.ending(run) or {})["loss"]))
    load = known.folder_of(best) / CHECKPOINTS
    cli.main(["--load", str(load), "--save", str(folder), "--to", "hf", *more])


def _of_text(known: State, run: PlannedRun, data: StudyData) -> Iterator[Line]:
    flags = ["--data-path", data.prefix("valid"), "--limit", str(WINDOWS)]
    scores = _evaluated(known, run, [*flags, "--breakdown"], name="text")
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
        scores = _evaluated(known, run, [*flags, "--base-eval", other], name="routing")
        yield _line(ROUTING, other, scores["nll"] / scores["tokens"], count=scores["tokens"])


def _of_tasks(
    known: State, run: PlannedRun, *, tasks: Sequence[str], data_dir: Path | None
) -> Iterator[Line]:
    flags = ["--tasks", ",".join(tasks)]
    flags += ["--data-dir", str(data_dir)] if data_dir else []
    for task, scores in _evaluated(known, run, flags, name="tasks")["results"].items():
        score = _accuracy(task, scores["metrics"])
        yield _line(TASK, task, score["value"], stderr=score["stderr"], count=scores["examples"])


def _accuracy(task: str, metrics: Mapping[str, Any]) -> Any:
    """Return the score that counts right answers: the paper's, or the first of SHARES."""
    names = (PAPER_METRICS.get(task), *SHARES)
    metric = next((name for name in names if name in metrics), None)
    if metric is None:
        raise UsageError(
            f"--tasks {task} has {', '.join(metrics)}, none of {', '.join(SHARES)}: studies count "
            "right answers. Leave it out."
        )
    return metrics[metric]


def _line(kind: str, label: str, value: float, *, count: int, stderr: float | None = None) -> Line:
    return {"kind": kind, "label": label, "value": value, "stderr": stderr, "count": count}


def _evaluated(known: State, run: PlannedRun, flags: Sequence[str], *, name: str) -> Any:
    """Run tools/evaluate.py with these flags, and return the JSON that it writes."""
    folder = known.folder_of(run) / f"evaluation-{name}"
    folder.mkdir(exist_ok=True)
    output = folder / "result.json"
    command = [
        *(sys.executable, "-c", "from megatron_smlp.commands import evaluate; evaluate()"),
        *("--checkpoint", str(known.folder_of(run) / CHECKPOINTS)),
        *(*flags, "--output", str(output)),
        *(f"{FLAG}={path}" for path in plugin_paths(run.flags)),
    ]
    code = run_command(command, folder=folder, stop=threading.Event())
    if code:
        text = "\n".join(f"  {line}" for line in last_lines(folder))
        raise UsageError(f"evaluating {run.title} failed ({code}), {folder}:\n{text}")
    return json.loads(output.read_text(encoding="utf-8"))
