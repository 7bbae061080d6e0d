"""The wheel, far from the checkout: its console scripts train, preprocess, convert and evaluate."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.launches import REPOSITORY, clean_environment

pytestmark = pytest.mark.slow

# What an installer's script does: look the entry point up, and call it.
START = (
    "import sys; from importlib.metadata import entry_points; sys.argv.pop(0); "
    "sys.exit(entry_points(group='console_scripts')[sys.argv[0]].load()())"
)
BUILD = "from setuptools import build_meta; import sys; print(build_meta.build_wheel(sys.argv[1]))"
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
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel holds."""
    built, source, site = (tmp_path_factory.mktemp(name) for name in ("wheel", "source", "site"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "pretrain_smlp.py"):
        shutil.copy(REPOSITORY / name, source)
    for name in ("configs", "megatron_smlp", "plugins"):
        shutil.copytree(REPOSITORY / name, source / name)
    subprocess.run([sys.executable, "-c", BUILD, str(built)], cwd=source, **QUIET)
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    return site


@pytest.fixture(scope="module")
def command(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """`command("smlp-pretrain", flag, ...)` runs it in a folder of its own; its output."""
    folder = tmp_path_factory.mktemp("elsewhere")

    def run(*arguments: object) -> str:
        done = subprocess.run(
            [sys.executable, "-c", START, *map(str, arguments)],
            cwd=folder,
            env={**clean_environment(), "PYTHONPATH": str(site)},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = "import megatron_smlp as m, pretrain_smlp as p; print(m.__file__, p.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", where],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(site)},
        **QUIET,
    )
    assert str(REPOSITORY) not in done.stdout
    return run


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


def test_the_other_commands_say_how_they_are_used(site: Path, command: Callable[..., str]) -> None:
    """Those of entry_points.txt that no job above has run."""
    (path,) = site.glob("*.dist-info/entry_points.txt")
    lines = [line for line in path.read_text().splitlines() if "megatron_smlp_presets" not in line]
    names = {line.split(" = ")[0] for line in lines if " = " in line}
    assert len(names) == 18
    assert names > RUN
    for name in sorted(names - RUN):
        assert "usage: " in command(name, "--help"), name


def test_the_tasks_of_the_harness_are_in_it(site: Path) -> None:
    here, there = (
        {path.name for path in (folder / "megatron_smlp" / "evaluation" / "tasks").glob("*.yaml")}
        for folder in (REPOSITORY, site)
    )
    assert here == there
    assert "copa_paper.yaml" in there
