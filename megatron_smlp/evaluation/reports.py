"""Results as a table on the console, as JSON, and as markdown beside the paper's figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_smlp.evaluation import paper
from megatron_smlp.evaluation.results import Score, TaskResult


def print_table(results: Sequence[TaskResult], console: Console, *, title: str) -> None:
    """A row a metric: task, metric, value, standard error, examples."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in ("task", "metric"):
        table.add_column(name, no_wrap=True)
    for name in ("value", "stderr", "examples"):
        table.add_column(name, justify="right")
    for result in results:
        for metric, score in result.scores.items():
            value, error = f"{score.value:.4f}", _error(score)
            table.add_row(result.task, metric, value, error, f"{result.examples:,}")
    console.print(table)


def _error(score: Score) -> str:
    return "n/a" if score.stderr is None else f"{score.stderr:.4f}"


def write_json(path: Path, *, model: dict[str, Any], results: Sequence[TaskResult]) -> None:
    """`{"model": {...}, "results": {task: {"examples", "version", "metrics"}}}`."""
    record = {"model": model, "results": {result.task: result.as_json() for result in results}}
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def as_markdown(results: Sequence[TaskResult], *, model: str) -> str:
    """What was measured; under it, apart and marked as such, what the paper reports."""
    lines = [
        f"# Zero-shot evaluation of {model}",
        "",
        "## Measured here",
        "",
        "| task | metric | value in % | standard error | examples |",
        "|---|---|---:|---:|---:|",
    ]
    for result in results:
        for metric, score in result.scores.items():
            error = "n/a" if score.stderr is None else f"{100 * score.stderr:.1f}"
            cells = (result.task, metric, f"{100 * score.value:.1f}", error, f"{result.examples}")
            lines.append(f"| {' | '.join(cells)} |")
    tasks = list(dict.fromkeys(filter(None, (paper.task_of(r.task) for r in results))))
    return "\n".join([*lines, *(_paper_lines(tasks) if tasks else [])]) + "\n"


def _paper_lines(tasks: Sequence[str]) -> list[str]:
    names = [f"{task} ({paper.METRICS[task]})" for task in tasks]
    return [
        "",
        "## Reported by the paper, not measured here",
        "",
        "arXiv 2203.06850, models of about 10B parameters, in %. Brackets: from secondary",
        "recollection. The metric is the one above that we read the column as.",
        "",
        f"| model | {' | '.join(names)} |",
        f"|---|{'---:|' * len(names)}",
        *(
            f"| {model} | {' | '.join(paper.cell(model, task) for task in tasks)} |"
            for model in paper.FIGURES
        ),
    ]
