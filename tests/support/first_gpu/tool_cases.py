"""From prose to a trained model, and what the tools do with it."""

from __future__ import annotations

import json
from importlib.util import find_spec

from support.first_gpu.notes import Notes, Place
from support.first_gpu.training import NUM_STEPS, SPARSE, run_flags, train
from support.launches import REPOSITORY

DOCS = REPOSITORY / "docs"


def text(place: Place, notes: Notes) -> None:
    """Turn prose into a dataset, and train a model on it for the tools below."""
    from support.language_models import save_tokenizer

    from megatron_smlp.data.prepare.preprocess_cli import main as preprocess

    folder = place.folder / "text"
    save_tokenizer(folder / "tokenizer")
    prose = "\n\n".join(path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md")))
    lines = (json.dumps({"text": paragraph}) + "\n" for paragraph in prose.split("\n\n"))
    (folder / "prose.jsonl").write_text("".join(lines), encoding="utf-8")
    tokenizer = f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {folder / 'tokenizer'}"
    prefix = folder / "prose"
    files = f"--input {folder / 'prose.jsonl'} --output-prefix {prefix}"
    preprocess(f"{files} --append-eod {tokenizer}".split())
    mock = "--mock-data --tokenizer-type NullTokenizer --vocab-size 500"
    flags = " ".join(run_flags(place, SPARSE).split())
    flags = flags.replace(mock, f"--data-path {prefix}_text_document --split 90,10,0 {tokenizer}")
    found = train(f"{flags} --save {folder / 'run'}", folder / "log")
    notes.check(len(found) == NUM_STEPS, f"{len(found)} steps on {len(prose):,} characters")


def evaluate(place: Place, notes: Notes) -> None:
    """Run tools/evaluate.py: perplexity of the trained model on its own data."""
    from megatron_smlp.evaluation.cli import main

    run, data = place.folder / "text" / "run", place.folder / "text" / "prose_text_document"
    main(["--checkpoint", str(run), "--data-path", str(data)])
    notes.passed("perplexity of the checkpoint")


def generate(place: Place, notes: Notes) -> None:
    """Run tools/generate.py on the checkpoint."""
    from megatron_smlp.generation.cli import main

    run = place.folder / "text" / "run"
    main(["--checkpoint", str(run), *_device(place), *SAMPLED])
    notes.passed("a prompt continued from the checkpoint")


SAMPLED = ["--prompt", "The model", "--max-new-tokens", "8", "--temperature", "0"]


def _device(place: Place) -> list[str]:
    return ["--device", place.device]


def convert(place: Place, notes: Notes) -> None:
    """Run tools/convert_checkpoint.py --to hf, with its check of the logits."""
    from megatron_smlp.conversion.cli import main

    folder = place.folder / "text"
    main(["--load", str(folder / "run"), "--save", str(folder / "hf"), "--to", "hf"])
    notes.check((folder / "hf" / "config.json").is_file(), "the forward check agreed")


def exported(place: Place, notes: Notes) -> None:
    """Run tools/generate.py on the exported folder."""
    from megatron_smlp.generation.cli import main

    main(["--hf", str(place.folder / "text" / "hf"), *_device(place), *SAMPLED])
    notes.passed("a prompt continued from the exported model")


def serve(place: Place, notes: Notes) -> None:
    """Check that tools/serve.py answers a completion."""
    if find_spec("uvicorn") is None or find_spec("fastapi") is None:
        notes.not_run("serving: pip install 'megatron-smlp[serve]' brings what it needs")
        return
    from fastapi.testclient import TestClient

    from megatron_smlp.generation.cli import build_parser
    from megatron_smlp.generation.language_model import load
    from megatron_smlp.serving.admission import Admission
    from megatron_smlp.serving.app import build_app

    model = ["--hf", str(place.folder / "text" / "hf"), *_device(place)]
    lm = load(build_parser().parse_args(model))
    app = build_app(lm, Admission(max_body_bytes=10_000, max_waiting=4))
    with TestClient(app, base_url="http://127.0.0.1") as client:
        body = {"model": lm.name, "prompt": "The model", "max_tokens": 8, "temperature": 0}
        answer = client.post("/v1/completions", json=body)
    notes.check(answer.status_code == 200, f"a completion answered with {answer.status_code}")
