"""The wheel, away from the checkout: its console scripts train, preprocess, convert, evaluate."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.launches import REPOSITORY, run_command

pytestmark = pytest.mark.slow

UV = shutil.which("uv") or str(REPOSITORY / ".cache" / "uv" / "bin" / "uv")
MODEL = """
    --make-vocab-size-divisible-by 4 --split 80,20,0 --strict-accounting
    --num-layers 2 --hidden-size 16 --ffn-hidden-size 32 --seq-length 16 --micro-batch-size 2
    --global-batch-size 2 --train-iters 2 --lr 1e-3 --eval-iters 0 --num-workers 0
    --architecture gmlp
"""
RUN = {
    *("smlp-train-tokenizer", "smlp-preprocess", "smlp-pretrain", "smlp-convert"),
    *("smlp-inspect-checkpoint", "smlp-inspect-dataset", "smlp-evaluate"),
}
"""The commands of `test_every_job_runs_from_the_wheel`."""
QUIET: dict[str, Any] = {"capture_output": True, "text": True, "check": True}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a fresh environment with the wheel and its requirements installed."""
    built, source, fresh = (tmp_path_factory.mktemp(name) for name in ("wheel", "source", "env"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "pretrain_smlp.py"):
        shutil.copy(REPOSITORY / name, source)
    for name in ("configs", "megatron_smlp", "plugins"):
        shutil.copytree(REPOSITORY / name, source / name)
    subprocess.run([UV, "build", "--wheel", "--out-dir", built, source], **QUIET)
    (wheel,) = built.glob("*.whl")
    subprocess.run([UV, "venv", "--python", sys.executable, fresh], **QUIET)
    lock = ("--constraint", REPOSITORY / "requirements.lock")
    subprocess.run([UV, "pip", "install", "--python", fresh, *lock, wheel], **QUIET)
    return fresh


@pytest.fixture(scope="module")
def command(environment: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Return `command("smlp-pretrain", flag, ...)`, which runs it elsewhere, for its output."""
    folder = tmp_path_factory.mktemp("elsewhere")

    def run(name: str, *arguments: object) -> str:
        return run_command([environment / "bin" / name, *map(str, arguments)], cwd=folder).stdout

    return run


def test_it_is_the_installed_one_that_runs(environment: Path, tmp_path: Path) -> None:
    where = "import megatron_smlp as m, pretrain_smlp as p; print(m.__file__, p.__file__)"
    done = subprocess.run([environment / "bin" / "python", "-c", where], cwd=tmp_path, **QUIET)
    assert done.stdout.count(str(environment)) == 2


def test_every_job_runs_from_the_wheel(command: Callable[..., str], tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    words = [f"{a}{b}" for a in ("one", "seven", "thir") for b in ("ty", "teen", "th", "fold")]
    documents = [" ".join(words[i:] + words[:i]) for i in range(len(words))] * 10
    lines = (json.dumps({"text": document}) + "\n" for document in documents)
    text.write_text("".join(lines), encoding="utf-8")
    pair, tokenizer = tmp_path / "pair", tmp_path / "tokenizer"
    command("smlp-train-tokenizer", "--input", text, "--vocab-size", 270, "--output", tokenizer)
    kind = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer)
    command("smlp-preprocess", "--input", text, "--output-prefix", pair, "--append-eod", *kind)
    data = ("--data-path", f"{pair}_text_document")
    assert (tmp_path / "pair_text_document.bin").stat().st_size
    run, exported = tmp_path / "run", tmp_path / "hf"
    assert "iteration 2 saved" in command(
        "smlp-pretrain", *MODEL.split(), *kind, *data, "--save", run
    )
    command("smlp-convert", "--load", run, "--save", exported, "--to", "hf")
    assert (exported / "model.safetensors").is_file()
    plugged = MODEL.replace("--architecture gmlp", "--plugin aft --architecture aft")
    command("smlp-pretrain", *plugged.split(), *kind, *data)
    for preset in ("configs/cpu/smlp_deterministic.yaml", "plugins/aft.yaml"):
        command("smlp-pretrain", "--config", preset, "--dry-run", *kind, *data)
    assert "iteration" in command("smlp-inspect-checkpoint", "show", run)
    assert "perplexity" in command("smlp-evaluate", "--checkpoint", run / "iter_0000002", *data)
    assert "usage: " in command("smlp-pretrain", "--help")
    assert "documents" in command("smlp-inspect-dataset", "show", f"{pair}_text_document")


def test_the_other_commands_say_how_they_are_used(
    environment: Path, command: Callable[..., str]
) -> None:
    """The commands that no job above has run."""
    names = {path.name for path in (environment / "bin").glob("smlp-*")}
    assert len(names) == 16
    assert names > RUN
    for name in sorted(names - RUN):
        assert "usage: " in command(name, "--help"), name


def test_the_tasks_of_the_harness_are_in_it(environment: Path) -> None:
    tasks = "megatron_smlp/evaluation/tasks/*.yaml"
    here = {path.name for path in REPOSITORY.glob(tasks)}
    there = {path.name for path in environment.glob(f"lib/python*/site-packages/{tasks}")}
    assert here == there
    assert "copa_paper.yaml" in there
