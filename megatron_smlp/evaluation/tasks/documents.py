"""Local files of the six tasks -> documents as lm-evaluation-harness has them from the hub.

The YAML files beside this one name these functions as `custom_dataset`; the harness calls them with
its metadata, of which `data_dir` is ours. FILES says what the files are called.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_smlp.errors import UsageError
from megatron_smlp.evaluation.tasks import fields
from megatron_smlp.evaluation.tasks.fields import Check

Document = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """Where the data of a task lies in --data-dir, and where a user gets it."""

    patterns: tuple[str, ...]
    origin: str
    columns: dict[str, Check]
    """Names that every document must have, and what they may hold."""


def _any(value: Any) -> None:
    """HellaSwag's label depends on its endings."""


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
    """The one file of a task in a folder.

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
    """Every document of a task's file, JSON lines or CSV, with the names it must have.

    Raises:
        UsageError: a line is no JSON object, lacks a name, or holds what is not allowed there; with
            file, line and name.
    """
    path = find_file(task, data_dir)
    reader = _rows_of_csv if path.suffix == ".csv" else _rows_of_json
    rows = []
    try:
        for line, row in reader(path):
            columns = FILES[task].columns
            if task == "hellaswag":
                columns = columns | _hellaswag_columns(row)
            _check_row(row, columns, task=task, where=f"{path}:{line}")
            rows.append(row)
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no UTF-8 text: {error.reason}") from error
    if not rows:
        raise UsageError(f"{path} is empty: task {task} has nothing to evaluate")
    return rows


def _hellaswag_columns(row: Document) -> dict[str, Check]:
    """The context in one part or in two, and the number of one of the endings."""
    parts = {"ctx_a": fields.maybe_empty, "ctx_b": fields.maybe_empty}
    count = len(row["endings"]) if isinstance(row.get("endings"), list) else 0
    return {
        **(parts if "ctx_a" in row else {"ctx": fields.text}),
        "label": fields.one_of(*range(count)),
    }


def _check_row(row: Document, columns: dict[str, Check], *, task: str, where: str) -> None:
    for name, check in columns.items():
        if row.get(name) is None:
            raise UsageError(
                f"{where} has no {name!r}, which task {task} reads; its data is "
                f"{FILES[task].origin}"
            )
        expected = check(row[name])
        if expected:
            raise UsageError(f"{where}: {name!r} is {row[name]!r:.60}; expected is {expected}")


def _rows_of_json(path: Path) -> Iterator[tuple[int, Document]]:
    """Lines end in a line feed: other characters that end lines are data within a string."""
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UsageError(f"{path}:{number} is no JSON: {error}") from error
            if not isinstance(row, dict):
                raise UsageError(f"{path}:{number} is no JSON object")
            yield number, row


def _rows_of_csv(path: Path) -> Iterator[tuple[int, Document]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                yield reader.line_num, row
        except csv.Error as error:
            raise UsageError(f"{path}:{reader.line_num + 1} is no CSV: {error}") from error


def _dataset(
    task: str, data_dir: str | Path, convert: Callable[[Document], list[Document]]
) -> dict[str, Any]:
    from datasets import Dataset

    rows = [out for row in read_documents(task, data_dir) for out in convert(row)]
    return {"validation": Dataset.from_list(rows)}


def _kept(task: str, **types: type) -> Callable[[Document], list[Document]]:
    """The names that the prompts read, some of them of the type that the harness reads."""

    def convert(row: Document) -> list[Document]:
        kept = {name: row[name] for name in FILES[task].columns}
        return [kept | {name: kind(kept[name]) for name, kind in types.items()}]

    return convert


def copa(data_dir: str | None = None, **metadata: Any) -> dict[str, Any]:
    """COPA of a local file, or of the hub where there is no folder."""
    if data_dir is None:
        from datasets import load_dataset

        return {"validation": load_dataset("aps/super_glue", "copa", split="validation")}
    return _dataset("copa", data_dir, _kept("copa", label=int))


def copa_question(doc: Document) -> str:
    """`The man broke his toe. What was the CAUSE of this?`"""
    question = {
        "cause": "What was the CAUSE of this?",
        "effect": "What happened as a RESULT?",
    }[doc["question"]]
    return f"{doc['premise'].strip()} {question}"


def piqa(data_dir: str, **metadata: Any) -> dict[str, Any]:
    return _dataset("piqa", data_dir, _kept("piqa", label=int))


def winogrande(data_dir: str, **metadata: Any) -> dict[str, Any]:
    return _dataset("winogrande", data_dir, _kept("winogrande", answer=str))


def storycloze(data_dir: str, **metadata: Any) -> dict[str, Any]:
    def convert(row: Document) -> list[Document]:
        sentences = {f"input_sentence_{n}": row[f"InputSentence{n}"] for n in range(1, 5)}
        endings = {f"sentence_quiz{n}": row[f"RandomFifthSentenceQuiz{n}"] for n in (1, 2)}
        return [{**sentences, **endings, "answer_right_ending": int(row["AnswerRightEnding"])}]

    return _dataset("storycloze", data_dir, convert)


def hellaswag(data_dir: str, **metadata: Any) -> dict[str, Any]:
    def convert(row: Document) -> list[Document]:
        start, rest = (row["ctx_a"], row["ctx_b"]) if "ctx_a" in row else split_context(row["ctx"])
        kept = {name: row[name] for name in ("activity_label", "endings")}
        return [{**kept, "ctx_a": start, "ctx_b": rest, "label": str(row["label"])}]

    return _dataset("hellaswag", data_dir, convert)


def split_context(context: str) -> tuple[str, str]:
    """ctx -> ctx_a, whole sentences, and ctx_b, the beginning of the sentence to be completed.

    For copies of the data without these two; the harness writes ctx_b with a capital letter.
    """
    ends = [match.end() for match in re.finditer(r"[.!?]['\")]*\s+", context)]
    cut = ends[-1] if ends and not re.search(r"[.!?]['\")]*\s*$", context) else len(context)
    return context[:cut].rstrip(), context[cut:]


def record(data_dir: str, **metadata: Any) -> dict[str, Any]:
    """A document per query: entities are spans of the passage, the end included."""

    def convert(row: Document) -> list[Document]:
        text = row["passage"]["text"]
        spans = row["passage"]["entities"]
        entities = [text[span["start"] : span["end"] + 1] for span in spans]
        return [
            {
                "passage": text,
                "query": query["query"],
                "entities": entities,
                "answers": [answer["text"] for answer in query["answers"]],
            }
            for query in row["qas"]
        ]

    return _dataset("record", data_dir, convert)
