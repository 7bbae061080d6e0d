"""Read local files of the six tasks into the documents that lm-evaluation-harness has from the hub.

The YAML files beside this one name these functions as `custom_dataset`; the harness calls them with
its metadata, of which `data_dir` is ours. FILES has the names of the files.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_smlp.errors import UsageError
from megatron_smlp.evaluation.tasks import fields
from megatron_smlp.evaluation.tasks.fields import Check

Document = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """The data of a task: its file in --data-dir, and the place where a user gets it."""

    patterns: tuple[str, ...]
    origin: str
    columns: dict[str, Check]
    """Names that every document must have, and a check of each value."""


def _any(value: Any) -> None:
    """Accept every value: what HellaSwag's label may be depends on its endings."""


FILES = {
    "copa": Source(
        ("copa*.jsonl", "COPA/val.jsonl"),
        "COPA/val.jsonl of https://dl.fbaipublicfiles.com/glue/superglue/data/v2/COPA.zip",
        {
            **dict.fromkeys(("premise", "choice1", "choice2"), fields.text),
            "question": fields.one_of("cause", "effect"),
            "label": fields.one_of(0, 1),
        },
    ),
    "piqa": Source(
        ("piqa*.jsonl",),
        "valid.jsonl and valid-labels.lst of https://yonatanbisk.com/piqa/data/, joined: each line "
        "with its label",
        {**dict.fromkeys(("goal", "sol1", "sol2"), fields.text), "label": fields.one_of(0, 1)},
    ),
    "storycloze": Source(
        ("storycloze*.csv", "cloze_test*.csv"),
        "the CSV of the Story Cloze Test, on request from "
        "https://cs.rochester.edu/nlp/rocstories/ (it is licensed and cannot be shipped)",
        {
            **{f"InputSentence{number}": fields.text for number in range(1, 5)},
            "RandomFifthSentenceQuiz1": fields.text,
            "RandomFifthSentenceQuiz2": fields.text,
            "AnswerRightEnding": fields.one_of(1, 2),
        },
    ),
    "winogrande": Source(
        ("winogrande*.jsonl", "dev.jsonl"),
        "dev.jsonl of https://storage.googleapis.com/ai2-mosaic/public/winogrande/"
        "winogrande_1.1.zip",
        {
            "sentence": fields.blank,
            **dict.fromkeys(("option1", "option2"), fields.text),
            "answer": fields.one_of(1, 2),
        },
    ),
    "hellaswag": Source(
        ("hellaswag*.jsonl",),
        "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl",
        {"activity_label": fields.text, "endings": fields.options, "label": _any},
    ),
    "record": Source(
        ("record*.jsonl", "ReCoRD/val.jsonl"),
        "ReCoRD/val.jsonl of https://dl.fbaipublicfiles.com/glue/superglue/data/v2/ReCoRD.zip",
        {"passage": fields.passage, "qas": fields.queries},
    ),
}


def find_file(task: str, data_dir: str | Path) -> Path:
    """Return the one file of a task in a folder.

    Raises:
        UsageError: there is none, or more than one.
    """
    source, folder = FILES[task], Path(data_dir)
    found = sorted({path for pattern in source.patterns for path in folder.glob(pattern)})
    if len(found) > 1:
        names = ", ".join(str(path.relative_to(folder)) for path in found)
        raise UsageError(f"--data-dir {folder} has several files for {task}: {names}; keep one")
    if not found:
        wanted = " or ".join(source.patterns)
        raise UsageError(
            f"--data-dir {folder} has no {wanted}, which task {task} reads; its data is "
            f"{source.origin}"
        )
    return found[0]


def read_documents(task: str, data_dir: str | Path) -> list[Document]:
    """Return every document of a task's file, JSON lines or CSV, checked.

    Raises:
        UsageError: a line is not a JSON object, lacks a name, or holds a value that is not allowed
            there; with file, line and name.
    """
    path = find_file(task, data_dir)
    reader = _rows_of_csv if path.suffix == ".csv" else _rows_of_json
    rows = []
    try:
        for line, row in reader(path):
            _check_row(row, task, where=f"{path}:{line}")
            rows.append(row)
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: {error.reason}") from error
    if not rows:
        raise UsageError(f"{path} is empty: task {task} has nothing to evaluate")
    return rows


def _check_row(row: Document, task: str, *, where: str) -> None:
    columns = FILES[task].columns
    if task == "hellaswag":  # the context in one part or in two, and the number of an ending
        parts = dict.fromkeys(("ctx_a", "ctx_b"), fields.maybe_empty)
        count = len(row["endings"]) if isinstance(row.get("endings"), list) else 0
        columns = columns | (parts if "ctx_a" in row else {"ctx": fields.text})
        columns["label"] = fields.one_of(*range(count))
    for name, check in columns.items():
        if row.get(name) is None:
            raise UsageError(
                f"{where} has no {name!r}, which task {task} reads; its data is "
                f"{FILES[task].origin}"
            )
        if expected := check(row[name]):
            raise UsageError(f"{where}: {name!r} is {row[name]!r:.60}; expected is {expected}")


def _rows_of_json(path: Path) -> Iterator[tuple[int, Document]]:
    """Yield the number and the object of each line that is not blank."""
    # Lines end in a line feed: other characters that end lines are data within a string.
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UsageError(f"{path}:{number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise UsageError(f"{path}:{number} is not a JSON object")
            yield number, row


def _rows_of_csv(path: Path) -> Iterator[tuple[int, Document]]:
    """Yield the number of the last line and the columns of each row."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                yield reader.line_num, row
        except csv.Error as error:
            raise UsageError(f"{path}:{reader.line_num + 1} is not CSV: {error}") from error


def _dataset(rows: Iterable[Document]) -> dict[str, Any]:
    from datasets import Dataset

    return {"validation": Dataset.from_list(list(rows))}


def _kept(task: str, data_dir: str, **types: type) -> dict[str, Any]:
    """Load the names that the prompts read, some converted to a type."""
    columns = FILES[task].columns
    return _dataset(
        {name: types[name](row[name]) if name in types else row[name] for name in columns}
        for row in read_documents(task, data_dir)
    )


def copa(data_dir: str | None = None, **metadata: Any) -> dict[str, Any]:
    """Load COPA from a local file, or from the hub where there is no folder."""
    if data_dir is None:
        from datasets import load_dataset

        return {"validation": load_dataset("aps/super_glue", "copa", split="validation")}
    return _kept("copa", data_dir, label=int)


def copa_question(doc: Document) -> str:
    """Return `The man broke his toe. What was the CAUSE of this?`."""
    questions = {"cause": "What was the CAUSE of this?", "effect": "What happened as a RESULT?"}
    return f"{doc['premise'].strip()} {questions[doc['question']]}"


def piqa(data_dir: str, **metadata: Any) -> dict[str, Any]:
    return _kept("piqa", data_dir, label=int)


def winogrande(data_dir: str, **metadata: Any) -> dict[str, Any]:
    return _kept("winogrande", data_dir, answer=str)


def storycloze(data_dir: str, **metadata: Any) -> dict[str, Any]:
    return _dataset(
        {
            **{f"input_sentence_{n}": row[f"InputSentence{n}"] for n in range(1, 5)},
            **{f"sentence_quiz{n}": row[f"RandomFifthSentenceQuiz{n}"] for n in (1, 2)},
            "answer_right_ending": int(row["AnswerRightEnding"]),
        }
        for row in read_documents("storycloze", data_dir)
    )


def hellaswag(data_dir: str, **metadata: Any) -> dict[str, Any]:
    def converted(row: Document) -> Document:
        start, rest = (row["ctx_a"], row["ctx_b"]) if "ctx_a" in row else split_context(row["ctx"])
        kept = {name: row[name] for name in ("activity_label", "endings")}
        return {**kept, "ctx_a": start, "ctx_b": rest, "label": str(row["label"])}

    return _dataset(map(converted, read_documents("hellaswag", data_dir)))


def split_context(context: str) -> tuple[str, str]:
    """Split ctx into ctx_a, whole sentences, and ctx_b, the beginning of the sentence to complete.

    For copies of the data without these two; the harness writes ctx_b with a capital letter.
    """
    ends = [match.end() for match in re.finditer(r"[.!?]['\")]*\s+", context)]
    cut = ends[-1] if ends and not re.search(r"[.!?]['\")]*\s*$", context) else len(context)
    return context[:cut].rstrip(), context[cut:]


def record(data_dir: str, **metadata: Any) -> dict[str, Any]:
    """Load a document per query: entities are spans of the passage, the end included."""
    return _dataset(
        {
            "passage": (text := row["passage"]["text"]),
            "query": query["query"],
            "entities": [text[s["start"] : s["end"] + 1] for s in row["passage"]["entities"]],
            "answers": [answer["text"] for answer in query["answers"]],
        }
        for row in read_documents("record", data_dir)
        for query in row["qas"]
    )
