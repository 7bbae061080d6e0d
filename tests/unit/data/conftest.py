"""Small corpora and tokenizers, made by the tests themselves."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from data_helpers import make_documents, parse, write_jsonl

from megatron_smlp.data.prepare import train_tokenizer_cli
from megatron_smlp.data.prepare.preprocessing import Summary, preprocess


@pytest.fixture(scope="session")
def documents() -> list[str]:
    return make_documents(300)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", documents)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "bpe"
    train_tokenizer_cli.main(f"--input {corpus} --output {folder} --vocab-size 320".split())
    return folder


@pytest.fixture(scope="session")
def gpt2_files(tokenizer_folder: Path) -> tuple[Path, Path]:
    """`vocab.json` and `merges.txt` of a small vocabulary in GPT-2's form."""
    model = json.loads((tokenizer_folder / "tokenizer.json").read_text())["model"]
    vocab, merges = tokenizer_folder.parent / "vocab.json", tokenizer_folder.parent / "merges.txt"
    vocab.write_text(json.dumps(model["vocab"]))
    pairs = [" ".join(pair) for pair in model["merges"]]
    merges.write_text("\n".join(["#version: 0.2", *pairs]) + "\n")
    return vocab, merges


@pytest.fixture(scope="session")
def hf_flags(tokenizer_folder: Path) -> list[str]:
    return ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer_folder)]


@pytest.fixture
def run() -> Callable[..., Summary]:
    """Preprocess in this process: `run(input, prefix, *flags)`."""

    def run_with(source: object, prefix: object, *flags: object) -> Summary:
        sources = source if isinstance(source, list) else [source]
        return preprocess(parse("--input", *sources, "--output-prefix", prefix, *flags))

    return run_with
