"""Trained checkpoints of a few systems with a real tokenizer, each with its export."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from evaluation_helpers import EXAMPLES, SYSTEMS, TEXT, Run, preprocessed, trained


@pytest.fixture(scope="package")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a byte-level BPE of 300 entries."""
    from megatron_smlp.data.prepare.train_tokenizer_cli import main

    folder: Path = tmp_path_factory.mktemp("tokenizer")
    draw = random.Random(0)
    lines = [{"text": " ".join(draw.choices(TEXT.split(), k=60))} for _ in range(50)]
    corpus = folder / "text.jsonl"
    corpus.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    main(["--input", str(corpus), "--vocab-size", "300", "--output", str(folder / "tokenizer")])
    return folder / "tokenizer"


@pytest.fixture(scope="package")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write COPA and PIQA files of random words."""
    folder: Path = tmp_path_factory.mktemp("tasks")
    draw = random.Random(1)

    def some(count: int) -> str:
        return " ".join(draw.choices(TEXT.split(), k=count))

    copa: list[dict[str, Any]] = []
    piqa: list[dict[str, Any]] = []
    for number in range(EXAMPLES):
        choices = {"choice1": some(3), "choice2": some(2)}
        copa.append({"premise": some(5), **choices, "question": "cause", "label": number % 2})
        piqa.append({"goal": some(4), "sol1": some(2), "sol2": some(4), "label": number % 2})
    for name, rows in {"copa": copa, "piqa": piqa}.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="package", params=SYSTEMS)
def run(
    request: pytest.FixtureRequest, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """Train for a few steps in this process."""
    return trained(SYSTEMS[request.param], tokenizer, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="package")
def data(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a dataset of three short documents."""
    return preprocessed(tokenizer, tmp_path_factory.mktemp("data"))
