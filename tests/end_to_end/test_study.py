"""A small but real study: data, a worker that is killed, two that go on, the report."""

import gzip
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas
import pytest
from support.launches import REPOSITORY, clean_environment, run_command
from support.studies import write_study
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_smlp.provenance import sources
from megatron_smlp.study.process import training_command

TOOL = [sys.executable, "tools/study.py"]
SMALL_MODEL = {"hidden-size": 32, "ffn-hidden-size": 64, "seq-length": 64}
TINY: dict[str, Any] = {
    "systems": ["transformer", "smlp_deterministic"],
    "vocab-size": 280,
    "fixed": {
        **SMALL_MODEL,
        "bf16": True,
        "eval-iters": 1,
        "log-interval": 1,
        "suffix-from": 0.5,
        "micro-batch-size": 4,
        "global-batch-size": 4,
    },
    "variants": {
        "transformer": {"num-layers": 2},
        "smlp_deterministic": {
            "num-layers": 3,
            "num-dense-layers": 2,
            "moe-ffn-hidden-size": 64,
            "num-experts": 2,
            "num-feature-experts": 2,
        },
    },
    "horizons": [2560, 5120],  # 10 and 20 steps
    "evaluations": 2,
    "seeds": [11],
    "flops-tolerance": 0.9,
    "needed-flops-tolerance": 0.9,
}

COPA = "".join(
    json.dumps({
        "premise": "the gate of a layer", "choice1": "to route", "choice2": "tokens",
        "question": "effect", "label": number % 2,
    }) + "\n"
    for number in range(4)
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run examples/study_data.sh on a corpus of a hundred documents."""
    folder = tmp_path_factory.mktemp("data")
    words = ["sparse", "all", "experts", "tokens", "route", "to", "the", "gate", "of", "a", "layer"]
    draw = random.Random(0)
    lines = [json.dumps({"text": " ".join(draw.choices(words, k=200))}) for _ in range(100)]
    (folder / "corpus.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    run_command(
        ["examples/study_data.sh"], CORPUS=str(folder / "corpus.jsonl.gz"), VOCABULARY="280",
        OUTPUT=str(folder / "made"), PYTHON_BIN=sys.executable,
    )  # fmt: skip
    return folder / "made"


def study_flags(study: Path, data: Path) -> list[str]:
    folder = study.parent
    return [str(study), "--data", str(data), "--runs", str(folder / "runs"),
            "--results", str(folder / "results")]  # fmt: skip


def worker(study: Path, data: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*TOOL, "run", *study_flags(study, data), "--expiry", "12"],
        cwd=REPOSITORY,
        env=clean_environment(),
    )


def logged(study: Path) -> int:
    """Count the steps that all runs of a study have logged."""
    files = (study.parent / "runs").glob("*/*/lr*/*/metrics.jsonl")
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_study_from_data_to_report(tmp_path: Path, data: Path):
    study = write_study(tmp_path, **TINY)
    first = worker(study, data)
    end = time.monotonic() + 300
    while logged(study) < 3:
        assert time.monotonic() < end
        assert first.poll() is None
        time.sleep(0.1)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert [each.wait() for each in (worker(study, data), worker(study, data))] == [0, 0]
    evaluate = [*TOOL, "evaluate", *study_flags(study, data)]
    tasks = [*evaluate, "--tasks", "copa", "--data-dir", str(tmp_path)]
    (tmp_path / "copa_val.jsonl").write_text(COPA, encoding="utf-8")
    for command, count in ((evaluate, 2), (tasks, 2), (tasks, 0), (evaluate, 0)):
        assert run_command(command).stdout.startswith(f"{count} checkpoints: ")
    run_command([*TOOL, "report", *study_flags(study, data)])
    text = (tmp_path / "results" / "report.md").read_text(encoding="utf-8")
    assert "on windows of all 5 validation documents" in text
    found = pandas.read_csv(tmp_path / "results" / "evaluations.csv")
    assert set(found["kind"]) == {
        "task", "routing", "position", "frequency", "repeat", "document",
    }  # fmt: skip
    routed = found[(found["system"] == "smlp_deterministic") & (found["kind"] == "routing")]
    assert set(routed["label"]) == {"greedy", "prices"}
    runs = pandas.read_csv(tmp_path / "results" / "runs.csv")
    assert set(runs["status"]) == {"done"}
    assert len(runs) == 6
    assert runs[runs["horizon"].notna()]["validation_loss"].notna().all()
    assert set(runs["sources"]) == {sources()}
    fingerprints = pandas.read_csv(tmp_path / "results" / "fingerprints.csv")
    assert set(fingerprints["system"]) == {"transformer", "smlp_deterministic"}

    export = ["--systems", "transformer,smlp_deterministic", "--save", str(tmp_path / "models")]
    run_command([*TOOL, "export", *study_flags(study, data), *export, "--license", "cc0-1.0"])
    for name in ("transformer", "smlp_deterministic"):
        folder = tmp_path / "models" / f"small-{name}"
        loss = runs[(runs["system"] == name) & runs["horizon"].eq(runs["horizon"].max())]["loss"]
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert "license: cc0-1.0" in card
        assert f"| validation loss | {loss.min():.4f}" in card
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        assert len(AutoTokenizer.from_pretrained(folder)) == 280

    # With a new folder for runs, the kept results are enough: nothing is left to do.
    again = run_command(
        [*TOOL, "plan", *study_flags(study, data), "--runs", str(tmp_path / "other")]
    )
    counts = next(line for line in again.stdout.splitlines() if line.split()[:1] == ["all"])
    assert counts.split()[-1] == "0"
    check_that_pieces_are_one_run(tmp_path, runs, data)


def check_that_pieces_are_one_run(folder: Path, runs: pandas.DataFrame, data: Path) -> None:
    """Train the longest horizon in one go with its stored flags: the losses must be equal."""
    from megatron_smlp.study.data import StudyData

    longest = runs[(runs["system"] == "smlp_deterministic") & (runs["end"] == 20)].iloc[0]
    whole = folder / "whole"
    paths = [*StudyData(data).flags, "--log-dir", str(whole)]
    run_command(training_command(whole, json.loads(longest["flags"]), paths=paths, processes=1))
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    losses = {line["iteration"]: line["loss"] for line in lines if "loss" in line}
    curves = pandas.read_csv(folder / "results" / "curves.csv")
    pieces = curves[(curves["key"] == longest["key"]) & curves["loss"].notna()]
    assert len(pieces) == 12
    assert [losses[step] for step in pieces["iteration"]] == pytest.approx(list(pieces["loss"]))


SIZES = {
    "D32": {},
    "D48": {"fixed": {"hidden-size": 48, "lr": 1.4e-3}, "evaluations": 1},
    "D64": {"fixed": {"hidden-size": 64}, "horizons": [2560], "seeds": [31]},
}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_study_of_several_sizes(tmp_path: Path, data: Path):
    """Two workers train two sizes, and the size that those predict."""
    study = write_study(tmp_path, **TINY | {"seeds": [11, 12], "sizes": SIZES})
    workers = [worker(study, data) for _ in range(2)]
    assert [one.wait() for one in workers] == [0, 0]
    run_command([*TOOL, "report", *study_flags(study, data)])
    results = tmp_path / "results"
    for size, widths in (("D32", 32), ("D48", 48), ("D64", 64)):
        runs = pandas.read_csv(results / f"small-{size}" / "runs.csv")
        assert set(runs["status"]) == {"done"}
        assert {json.loads(flags)["hidden_size"] for flags in runs["flags"]} == {widths}
        assert len(runs) == (2 if size == "D64" else 2 * 2 * 3)
        assert (results / f"small-{size}" / "report.md").exists()
    text = (results / "report.md").read_text(encoding="utf-8")
    [row] = [line for line in text.splitlines() if line.startswith("| D48 | 48 | transformer |")]
    assert row.count("±") == 3  # two horizons and a slope
    assert text.split("## Predictions")[1].count("±") == 2
    assert (results / "differences.png").exists()


@pytest.mark.slow
def test_data_of_another_vocabulary_are_refused(tmp_path: Path, data: Path):
    study = write_study(tmp_path, **TINY | {"vocab-size": 281})
    said = run_command([*TOOL, "run", *study_flags(study, data)], code=2).stderr
    assert "vocab-size 281 of the study, but the tokenizer" in said
    assert "VOCABULARY=281" in said


def test_a_slurm_task_is_a_worker(tmp_path: Path):
    """The script passes its arguments on to the program given in place of Python."""
    study = write_study(tmp_path)
    echo = tmp_path / "python"
    echo.write_text('#!/bin/sh\necho "$@"\n', encoding="utf-8")
    echo.chmod(0o755)
    done = run_command(
        ["examples/study_slurm.sh", "--data", "DATA"], STUDY=str(study), PYTHON=str(echo),
        SLURM_GPUS_ON_NODE="8", SLURM_ARRAY_TASK_ID="3", CUDA_VISIBLE_DEVICES="0",
    )  # fmt: skip
    assert done.stdout.split()[1:] == ["run", str(study), "--processes", "8", "--data", "DATA"]


@pytest.mark.slow
def test_a_plugin_is_a_system_of_a_study(data: Path, tmp_path: Path):
    """It is named by its preset; its source counts among the sources of the study's runs."""
    variants = {
        "transformer": TINY["variants"]["transformer"],
        "aft": {"from": "../../plugins/aft", "num-layers": 2},
    }
    tiny = TINY | {"systems": ["transformer", "aft"], "subject": "aft", "variants": variants}
    study = write_study(tmp_path, **tiny)
    run_command([*TOOL, "run", *study_flags(study, data)])
    evaluated = run_command([*TOOL, "evaluate", *study_flags(study, data)])
    assert evaluated.stdout.startswith("2 checkpoints")
    models = ["--systems", "aft", "--save", str(tmp_path / "models")]
    export = ["export", *study_flags(study, data), *models]
    run_command([*TOOL, *export])
    assert (tmp_path / "models" / "small-aft" / "aft.py").is_file()
    run_command([*TOOL, "report", *study_flags(study, data)])
    runs = pandas.read_csv(tmp_path / "results" / "runs.csv")
    assert set(runs.status) == {"done"}
    assert set(runs.sources) != {sources()}
    assert runs.sources.nunique() == 1
    assert "aft" in (tmp_path / "results" / "report.md").read_text(encoding="utf-8")
