"""The commands of docs/evaluation.md as a user types them: lm_eval, tools/evaluate.py, serve.py."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from evaluation_helpers import EXAMPLES, SYSTEMS, Run, trained
from support.evaluations import evaluate_all
from support.launches import REPOSITORY, clean_environment, launch_calls

from megatron_smlp.evaluation.selection import TASK_FOLDER

LENGTH = 64
TASKS = ("copa", "piqa")


@pytest.fixture(scope="module")
def one(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Long enough for every example: local-completions cuts longer ones elsewhere than `hf`."""
    flags = f"{SYSTEMS['partial']} --seq-length {LENGTH} --max-position-embeddings {LENGTH}"
    return trained(flags, tokenizer, tmp_path_factory.mktemp("one"))


def start(*words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=REPOSITORY,
        env=clean_environment(HF_HUB_OFFLINE="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return out


def lm_eval(model: str, arguments: str, tasks: Path, output: Path) -> list[object]:
    """The harness's own command over our offline tasks."""
    metadata = json.dumps({"data_dir": str(tasks)})
    return [
        *("-m", "lm_eval", "--model", model, "--model_args", arguments, "--log_samples"),
        *("--tasks", ",".join(TASKS), "--include_path", TASK_FOLDER, "--metadata", metadata),
        *("--output_path", output),
    ]


def stock_scores(folder: Path) -> dict[tuple[str, int], list[float]]:
    """(task, document) -> log-likelihoods, from what --log_samples wrote."""
    scores = {}
    for task in TASKS:
        [path] = folder.rglob(f"samples_{task}_*.jsonl")
        for line in path.read_text(encoding="utf-8").splitlines():
            sample = json.loads(line)
            answers = [float(answer[0][0]) for answer in sample["resps"]]
            scores[task, sample["doc_id"]] = answers
    return scores


def stock_accuracy(folder: Path) -> dict[str, float]:
    [path] = folder.rglob("results_*.json")
    results = json.loads(path.read_text(encoding="utf-8"))["results"]
    return {task: results[task]["acc,none"] for task in TASKS}


@pytest.fixture(scope="module")
def ours(one: Run, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return scores and accuracies of the checkpoint by tools/evaluate.py."""
    folder: Path = tmp_path_factory.mktemp("ours")
    command = [
        *("--checkpoint", one.checkpoint, "--tasks", ",".join(TASKS), "--data-dir", tasks),
        *("--output", folder / "results.json", "--samples", folder / "samples.jsonl"),
    ]
    log = folder / "log"
    words = [[*map(str, command)]]
    launch_calls(evaluate_all, words, processes=1, log=log, HF_HUB_OFFLINE="1")
    assert "copa" in log.read_text(encoding="utf-8")
    lines = (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    samples = [json.loads(line) for line in lines]
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))["results"]
    return {
        "scores": {(one["task"], one["doc_id"]): one["loglikelihoods"] for one in samples},
        "accuracy": {name: results[name]["metrics"]["acc"]["value"] for name in TASKS},
    }


def check(folder: Path, ours: dict[str, Any]) -> None:
    theirs = stock_scores(folder)
    assert theirs.keys() == ours["scores"].keys()
    assert len(theirs) == 2 * EXAMPLES
    for key, expected in theirs.items():
        assert ours["scores"][key] == pytest.approx(expected, abs=1e-4), key
    assert stock_accuracy(folder) == pytest.approx(ours["accuracy"])


def test_stock_lm_eval_on_the_exported_folder(
    one: Run, tasks: Path, ours: dict[str, Any], tmp_path: Path
) -> None:
    arguments = f"pretrained={one.exported},trust_remote_code=True"
    finished(start(*lm_eval("hf", arguments, tasks, tmp_path), "--device", "cpu"))
    check(tmp_path, ours)


@pytest.fixture
def address(one: Run) -> Iterator[str]:
    server = start("tools/serve.py", "--checkpoint", one.checkpoint, "--port", "0")
    try:
        line = server.stdout.readline()
        assert line.startswith("serving"), server.stderr.read()
        yield line.split()[3]
    finally:
        server.terminate()
        server.communicate(timeout=60)


@pytest.mark.slow
def test_lm_eval_on_a_running_server(
    address: str, one: Run, tasks: Path, ours: dict[str, Any], tmp_path: Path
) -> None:
    arguments = (
        f"base_url={address}/completions,model=run,tokenizer_backend=huggingface,"
        f"tokenizer={one.exported},max_length={LENGTH},num_concurrent=2"
    )
    finished(start(*lm_eval("local-completions", arguments, tasks, tmp_path)))
    check(tmp_path, ours)


def test_the_perplexity_of_an_exported_folder_is_that_of_its_checkpoint(
    one: Run, data: Path, tmp_path: Path
) -> None:
    models = {"--checkpoint": one.checkpoint, "--hf": one.exported}
    outputs = [tmp_path / f"perplexity{flag}.json" for flag in models]
    commands = [
        [*f"--data-path {data} --stride 16 --output {output}".split(), flag, str(model)]
        for output, (flag, model) in zip(outputs, models.items(), strict=True)
    ]
    log = tmp_path / "log"
    launch_calls(evaluate_all, commands, processes=1, log=log)
    assert log.read_text(encoding="utf-8").count("suffix perplexity: ") == 2
    ours, theirs = (json.loads(output.read_text(encoding="utf-8")) for output in outputs)
    assert ours.pop("checkpoint") == str(one.checkpoint)
    assert theirs.pop("hf") == str(one.exported)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert value == ours[name] or value == pytest.approx(ours[name], rel=1e-5), name
