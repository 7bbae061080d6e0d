"""Small systems to evaluate, and Megatron's model of a checkpoint in the test's own process."""

import contextlib
import json
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from support.beginning import begin_texts
from support.conversions import run as convert
from support.in_process import pretrained

from megatron_smlp.conversion.convert import torch_dist_to_hf

TEXT = "the model mixes every token with what came before it and nothing that comes after, twice"
LENGTH = 24
EXAMPLES = 12
"""Number of examples of each task in the fixture `tasks`."""

SIZES = f"--seq-length {LENGTH} --max-position-embeddings {LENGTH} --num-layers 2"
SYSTEMS = {
    "partial": (
        f"{SIZES} --architecture smlp --num-dense-layers 1 --feature-router partial "
        "--num-feature-experts 2 --num-experts 4 --token-router base"
    ),
    "gshard": (
        f"{SIZES} --architecture transformer --num-attention-heads 4 --num-experts 4 "
        "--token-router gshard --moe-eval-capacity-factor 1"
    ),
}


@dataclass(frozen=True)
class Run:
    """One system, in both formats."""

    checkpoint: Path
    exported: Path


def trained(flags: str, tokenizer: Path, folder: Path) -> Run:
    """Train for a few steps in this process; return the run and its export."""
    flags = (
        f"{flags} --tokenizer-type HuggingFaceTokenizer --tokenizer-model {tokenizer} "
        f"--save {folder / 'run'} --lr 3e-2 --init-method-std 0.2 --train-iters 3 --eval-iters 0"
    )
    with pretrained(flags):
        pass
    chosen = {"tokenizer_model": str(tokenizer), "checks": False}
    convert(torch_dist_to_hf, folder / "run", folder / "hf", **chosen)
    return Run(checkpoint=folder / "run", exported=folder / "hf")


def beginning(tokenizer: Path, folder: Path, number: int) -> Path:
    """Make a tokenizer that puts this id before each text, as Llama's puts `<s>`."""
    shutil.copytree(tokenizer, folder)
    begin_texts(folder, number)
    return folder


TEXTS = tuple(f"{TEXT} {number}" for number in range(3))


def preprocessed(tokenizer: Path, folder: Path, texts: Sequence[str] = TEXTS) -> Path:
    """Make a dataset of short documents; return its prefix."""
    from megatron_smlp.data.prepare.preprocess_cli import main

    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (folder / "text.jsonl").write_text("".join(lines), encoding="utf-8")
    argv = (
        f"--input {folder / 'text.jsonl'} --output-prefix {folder / 'text'} --append-eod "
        f"--workers 1 --tokenizer-type HuggingFaceTokenizer --tokenizer-model {tokenizer}"
    )
    main(argv.split())
    return folder / "text_text_document"


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
test_split: train
doc_to_text: "{{{{question}}}}"
"""
CHOICE = """
output_type: multiple_choice
target_delimiter: ""
doc_to_choice: "{{options}}"
doc_to_target: 0
metric_list: [{metric: acc}]
"""
WRITING = """
output_type: generate_until
doc_to_target: " every"
generation_kwargs: {max_gen_toks: 3, until: ["absent"]}
metric_list: [{metric: exact_match}]
"""


def write_task(folder: Path, name: str, documents: Sequence[Any], form: str = CHOICE) -> None:
    """Write a custom task: questions, each with options, of which the first is right."""
    rows = [json.dumps({"question": q, "options": options}) + "\n" for q, options in documents]
    data = folder / f"{name}.jsonl"
    data.write_text("".join(rows), encoding="utf-8")
    (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data) + form, encoding="utf-8")


@contextlib.contextmanager
def loaded(
    checkpoint: Path, *flags: str, dtype: str = "auto"
) -> Iterator[tuple[Any, list[Any], Any]]:
    """Yield what `load_model` returns; Megatron forgets it afterwards."""
    from support.runs import forget_run

    from megatron_smlp.evaluation.megatron_loading import load_model

    try:
        yield load_model(str(checkpoint), flags, dtype=dtype)
    finally:
        forget_run()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def instances(pairs: list[Any], kind: str = "loglikelihood") -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=pair, idx=number)
        for number, pair in enumerate(pairs)
    ]


def scoring_cases() -> list[tuple[str, str]]:
    """Return contexts from none to over T, options of one token and more, one context twice."""
    draw = random.Random(3)
    words = TEXT.split()
    pairs = [("", " the model"), ("the model", " mixes"), ("the model", " nothing"), ("a ", "b")]
    for length in (1, 2, 5, 8, 30, 60):
        context = " ".join(draw.choices(words, k=length))
        pairs += [(context, " " + " ".join(draw.choices(words, k=k))) for k in (1, 3)]
    return pairs
