"""Report the harness's results: as scores, on the console, in JSON and metrics.jsonl."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

from megatron_smlp.durable import write_durably

PAPER_METRICS = {
    "copa": "acc",
    "piqa": "acc",
    "storycloze": "acc",
    "winogrande": "acc",
    "hellaswag": "acc_norm",
    "record": "em",
}
"""The harness's metric that corresponds to each column of the paper."""
PAPER_FIGURES = {
    "BASE 10B": ("63.0", "63.8", "n/a", "51.0", "n/a", "60.7"),
    "HASH 10B": ("64.0", "63.8", "n/a", "51.7", "33.0", "67.2"),
    "GShard 9B": ("76.0", "68.1", "n/a", "51.1", "38.0", "72.4"),
    "Switch 9B": ("75.0", "n/a", "n/a", "53.4", "52.5", "79.9"),
    "sMLP-deterministic 9.4B": ("79.0", "73.0", "n/a", "54.3", "54.5", "73.4"),
}
"""Accuracy in %, for ReCoRD exact match, from arXiv 2203.06850 and its public leaderboards; n/a: a
figure that we have no source for."""


@dataclass(frozen=True)
class Score:
    """A metric of a task."""

    value: float
    stderr: float | None
    """Standard error of the mean; None where the harness has none."""


@dataclass(frozen=True)
class TaskResult:
    """A task's metrics over its examples."""

    task: str
    examples: int
    scores: dict[str, Score]
    version: str
    samples: list[dict[str, Any]] = field(repr=False, default_factory=list)
    """Each example: document id, target, and the options' log-likelihoods."""

    def as_json(self) -> dict[str, Any]:
        scores = {name: asdict(score) for name, score in self.scores.items()}
        return {"examples": self.examples, "version": self.version, "metrics": scores}


def from_harness(results: Mapping[str, Any]) -> list[TaskResult]:
    """Return a result per task, and per group with scores, from what `lm_eval.simple_evaluate`
    returned, in its order."""
    return [
        TaskResult(
            task=name,
            examples=int(values["sample_len"]),
            scores=_scores(values),
            version=str(results["versions"].get(name)),
            samples=[_sample(name, row) for row in results.get("samples", {}).get(name, [])],
        )
        for name, values in results["results"].items()
        if "sample_len" in values
    ]


def _scores(values: Mapping[str, Any]) -> dict[str, Score]:
    """Turn `{"acc,none": 0.5, "acc_stderr,none": 0.05}` into `{"acc": Score(0.5, 0.05)}`."""
    scores = {}
    for key, value in values.items():
        metric, _, filter_name = key.partition(",")
        if not filter_name or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{metric}_stderr,{filter_name}")
        stderr = float(error) if isinstance(error, int | float) else math.nan
        name = metric if filter_name == "none" else f"{metric} ({filter_name})"
        scores[name] = Score(float(value), stderr if math.isfinite(stderr) else None)
    return scores


def _sample(task: str, sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return one example: the texts of a generation, the log-likelihoods of any other."""
    answers = [answer[0] for answer in sample["resps"]]
    record: dict[str, Any] = {"task": task, "doc_id": sample["doc_id"], "target": sample["target"]}
    if sample["filter"] != "none":
        record["filter"] = sample["filter"]
    if answers and isinstance(answers[0], list | tuple):
        record["loglikelihoods"] = [float(answer[0]) for answer in answers]
        record["is_greedy"] = [bool(answer[1]) for answer in answers]
    else:
        record["answers"] = [answer for repeats in sample["resps"] for answer in repeats]
    return record | {name: sample[name] for name in sample["metrics"] if name in sample}


def as_record(results: Iterable[TaskResult]) -> dict[str, dict[str, float | None]]:
    """Return `{"copa": {"acc": 0.55, "acc_stderr": 0.05, "examples": 99}}` for metrics.jsonl."""
    return {
        result.task: {
            **{name: score.value for name, score in result.scores.items()},
            **{f"{name}_stderr": score.stderr for name, score in result.scores.items()},
            "examples": result.examples,
        }
        for result in results
    }


def task_texts(results: Iterable[TaskResult]) -> list[str]:
    """Return a text per task for the console: `copa acc 0.550`."""
    texts = []
    for result in results:
        scores = [f"{name} {score.value:.3f}" for name, score in result.scores.items()]
        texts.append(" ".join([result.task, *scores]))
    return texts


def print_table(results: Sequence[TaskResult], file: TextIO, *, title: str) -> None:
    """Print a row per metric: task, metric, value, standard error, examples."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in ("task", "metric"):
        table.add_column(name, no_wrap=True)
    for name in ("value", "stderr", "examples"):
        table.add_column(name, justify="right")
    for result in results:
        for metric, score in result.scores.items():
            error = "n/a" if score.stderr is None else f"{score.stderr:.4f}"
            table.add_row(result.task, metric, f"{score.value:.4f}", error, f"{result.examples:,}")
    console = Console(file=file, highlight=False, markup=False, soft_wrap=True)
    console.print(table)


def write_json(path: Path, *, model: dict[str, Any], results: Sequence[TaskResult]) -> None:
    """Write `{"model", "results": {task: {"examples", "version", "metrics"}}}`."""
    record = {"model": model, "results": {result.task: result.as_json() for result in results}}
    replace_file(path, json.dumps(record, indent=2) + "\n")


def replace_file(path: Path, text: str) -> None:
    """Write a file, or a device such as /dev/stdout; a crash leaves a file's previous content."""
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
    else:
        write_durably(path.resolve(), text)


def write_samples(path: Path, results: Sequence[TaskResult]) -> None:
    """Write each example as one JSON object on a line of its own."""
    lines = [
        json.dumps(sample, ensure_ascii=False, default=str) + "\n"
        for result in results
        for sample in result.samples
    ]
    replace_file(path, "".join(lines))
