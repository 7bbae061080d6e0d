"""The harness's results, in few words: scores with their errors, and each example's options."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Score:
    """A metric of a task."""

    value: float
    stderr: float | None
    """Standard error of the mean; None where the harness has none."""


@dataclass(frozen=True)
class TaskResult:
    """A task's metrics, over so many examples."""

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
    """What `lm_eval.simple_evaluate` returned -> a result per task, in its order."""
    tasks = [name for name in results["results"] if name in results["n-samples"]]
    return [
        TaskResult(
            task=name,
            examples=int(results["n-samples"][name]["effective"]),
            scores=_scores(results["results"][name]),
            version=str(results["versions"].get(name)),
            samples=[_sample(name, one) for one in results.get("samples", {}).get(name, [])],
        )
        for name in tasks
    ]


def _scores(values: Mapping[str, Any]) -> dict[str, Score]:
    """`{"acc,none": 0.5, "acc_stderr,none": 0.05}` -> `{"acc": Score(0.5, 0.05)}`."""
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
    """One example; a generation has its text where others have log-likelihoods."""
    answers = [answer[0] for answer in sample["resps"]]
    record: dict[str, Any] = {"task": task, "doc_id": sample["doc_id"], "target": sample["target"]}
    if answers and isinstance(answers[0], list | tuple):
        record["loglikelihoods"] = [float(answer[0]) for answer in answers]
        record["is_greedy"] = [bool(answer[1]) for answer in answers]
    else:
        record["answers"] = answers
    return record | {name: sample[name] for name in sample["metrics"] if name in sample}


def as_record(results: Iterable[TaskResult]) -> dict[str, dict[str, float | None]]:
    """For metrics.jsonl: `{"copa": {"acc": 0.55, "acc_stderr": 0.05, "examples": 100}}`."""
    return {
        result.task: {
            **{name: score.value for name, score in result.scores.items()},
            **{f"{name}_stderr": score.stderr for name, score in result.scores.items()},
            "examples": result.examples,
        }
        for result in results
    }


def task_texts(results: Iterable[TaskResult]) -> list[str]:
    """For a console line: `copa acc 0.550`."""
    return [
        " ".join([result.task, *(f"{name} {score.value:.3f}" for name, score in pairs)])
        for result in results
        for pairs in [result.scores.items()]
    ]


def write_samples(results: list[TaskResult], path: Path) -> None:
    """One JSON object a line, an example each."""
    with path.open("w", encoding="utf-8") as file:
        for result in results:
            for sample in result.samples:
                file.write(json.dumps(sample, ensure_ascii=False, default=str) + "\n")
