"""Read local files of the six tasks into the documents that lm-evaluation-harness has on the hub.

The YAML files in this folder name these functions as `custom_dataset`; the harness passes them its
metadata, including our `data_dir`. FILES has the names of the files. Labels, and that texts are not
empty, are checked: otherwise the harness would return a meaningless score.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_smlp.errors import UsageError

Document = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """The data of a task: its file in --data-dir, and where users can get it."""

    patterns: tuple[str, ...]
    origin: str


SUPERGLUE = "https://dl.fbaipublicfiles.com/glue/superglue/data/v2"
FILES = {
    "copa": Source(("copa*.jsonl", "COPA/val.jsonl"), f"COPA/val.jsonl of {SUPERGLUE}/COPA.zip"),
    "piqa": Source(
        ("piqa*.jsonl",),
        "valid.jsonl and valid-labels.lst of https://yonatanbisk.com/piqa/data/, joined: each line "
        "with its label",
    ),
    "storycloze": Source(
        ("storycloze*.csv", "cloze_test*.csv"),
        "the CSV of the Story Cloze Test, on request from "
        "https://cs.rochester.edu/nlp/rocstories/ (it is licensed and cannot be shipped)",
    ),
    "winogrande": Source(
        ("winogrande*.jsonl", "dev.jsonl"),
        "dev.jsonl of https://storage.googleapis.com/ai2-mosaic/public/winogrande/"
        "winogrande_1.1.zip",
    ),
    "hellaswag": Source(
        ("hellaswag*.jsonl",),
        "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl",
    ),
    "record": Source(
        ("record*.jsonl", "ReCoRD/val.jsonl"), f"ReCoRD/val.jsonl of {SUPERGLUE}/ReCoRD.zip"
    ),
}


def find_file(task: str, data_dir: str | Path) -> Path:
    """Return the one file of a task in a folder.

    Raises:
        UsageError: there is none, or more than one.
    """
    source, folder = FILES[task], Path(data_dir)
    paths = sorted({path for pattern in source.patterns for path in folder.glob(pattern)})
    if len(paths) > 1:
        names = ", ".join(str(path.relative_to(folder)) for path in paths)
        raise UsageError(f"--data-dir {folder} has several files for {task}: {names}; keep one")
    if not paths:
        wanted = " or ".join(source.patterns)
        raise UsageError(
            f"--data-dir {folder} has no {wanted} for task {task}; its data is {source.origin}"
        )
    return paths[0]


def read_documents(
    task: str, data_dir: str | Path, convert: Callable[[Document], Iterable[Document]]
) -> dict[str, Any]:
    """Return the documents that `convert` makes from each row of a task's file, JSON lines or CSV.

    Raises:
        UsageError: a line is not a JSON object, lacks a key, or holds a value that is not allowed
            there; the message names file and line.
    """
    from datasets import Dataset

    path = find_file(task, data_dir)
    documents: list[Document] = []
    try:
        for line, row in _rows(path):
            try:
                documents += convert(json.loads(row) if isinstance(row, str) else row)
            except (KeyError, TypeError, ValueError) as error:
                raise UsageError(
                    f"{path}:{line} is invalid for task {task} ({type(error).__name__}: "
                    f"{error}); its data is {FILES[task].origin}"
                ) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    if not documents:
        raise UsageError(f"{path} is empty: task {task} has nothing to evaluate")
    return {"validation": Dataset.from_list(documents)}


def _texts(row: Document, *names: str) -> Document:
    """Return these entries of a row, after checking that they are non-empty texts."""
    for name in names:
        if not isinstance(row[name], str) or not row[name].strip():
            raise ValueError(f"{name!r} is {row[name]!r:.60}; expected non-empty text")
    return {name: row[name] for name in names}


def _choice(row: Document, name: str, allowed: Iterable[int | str]) -> str:
    """Return an entry, after checking that it is allowed; a number may be written as text."""
    texts = list(map(str, allowed))
    if str(row[name]) not in texts:
        raise ValueError(f"{name!r} is {row[name]!r:.60}; expected {' or '.join(texts)}")
    return str(row[name])


def _rows(path: Path) -> Iterator[tuple[int, Document | str]]:
    """Yield the number of each non-blank line, and its CSV columns or its JSON text."""
    is_csv = path.suffix == ".csv"
    # JSON lines end in a line feed: other line-ending characters are data within a string.
    with path.open(encoding="utf-8-sig", newline="" if is_csv else "\n") as file:
        if is_csv:
            reader = csv.DictReader(file, strict=True)
            yield from ((reader.line_num, row) for row in reader)
        else:
            yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())


def copa(data_dir: str | None = None, **metadata: Any) -> dict[str, Any]:
    """Load COPA from a local file, or from the hub if no folder is given."""
    if data_dir is None:
        from datasets import load_dataset

        return {"validation": load_dataset("aps/super_glue", "copa", split="validation")}

    def convert(row: Document) -> Iterator[Document]:
        question = _choice(row, "question", ("cause", "effect"))
        texts = _texts(row, "premise", "choice1", "choice2")
        yield {**texts, "question": question, "label": int(_choice(row, "label", (0, 1)))}

    return read_documents("copa", data_dir, convert)


def copa_question(doc: Document) -> str:
    """Return `The man broke his toe. What was the CAUSE of this?`."""
    questions = {"cause": "What was the CAUSE of this?", "effect": "What happened as a RESULT?"}
    return f"{doc['premise'].strip()} {questions[doc['question']]}"


def piqa(data_dir: str, **metadata: Any) -> dict[str, Any]:
    def convert(row: Document) -> Iterator[Document]:
        yield {**_texts(row, "goal", "sol1", "sol2"), "label": int(_choice(row, "label", (0, 1)))}

    return read_documents("piqa", data_dir, convert)


def winogrande(data_dir: str, **metadata: Any) -> dict[str, Any]:
    def convert(row: Document) -> Iterator[Document]:
        texts = _texts(row, "sentence", "option1", "option2")
        yield {**texts, "answer": _choice(row, "answer", (1, 2))}

    return read_documents("winogrande", data_dir, convert)


def storycloze(data_dir: str, **metadata: Any) -> dict[str, Any]:
    names = {f"InputSentence{n}": f"input_sentence_{n}" for n in range(1, 5)}
    names |= {f"RandomFifthSentenceQuiz{n}": f"sentence_quiz{n}" for n in (1, 2)}

    def convert(row: Document) -> Iterator[Document]:
        texts = {names[name]: text for name, text in _texts(row, *names).items()}
        yield {**texts, "answer_right_ending": int(_choice(row, "AnswerRightEnding", (1, 2)))}

    return read_documents("storycloze", data_dir, convert)


def hellaswag(data_dir: str, **metadata: Any) -> dict[str, Any]:
    def convert(row: Document) -> Iterator[Document]:
        label = _choice(row, "label", range(len(row["endings"])))
        kept = {name: row[name] for name in ("ctx_a", "ctx_b", "endings")}
        yield {**_texts(row, "activity_label"), **kept, "label": label}

    return read_documents("hellaswag", data_dir, convert)


def record(data_dir: str, **metadata: Any) -> dict[str, Any]:
    """Load a document per query; entities are spans of the passage, ends inclusive."""

    def convert(row: Document) -> Iterator[Document]:
        text, spans = row["passage"]["text"], row["passage"]["entities"]
        for query in row["qas"]:
            yield {
                "passage": text,
                "query": query["query"],
                "entities": [text[span["start"] : span["end"] + 1] for span in spans],
                "answers": [answer["text"] for answer in query["answers"]],
            }

    return read_documents("record", data_dir, convert)
