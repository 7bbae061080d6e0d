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
from support.language_models import save_language_model
from support.launches import REPOSITORY, clean_environment, launch_calls
from support.smlp_systems import LONGEST

from megatron_smlp.errors import UsageError
from megatron_smlp.evaluation import cli, reports
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


@pytest.mark.slow  # a process of its own that imports everything
def test_stock_lm_eval_on_the_exported_folder(
    one: Run, tasks: Path, ours: dict[str, Any], tmp_path: Path
) -> None:
    arguments = f"pretrained={one.exported},trust_remote_code=True"
    finished(start(*lm_eval("hf", arguments, tasks, tmp_path), "--device", "cpu"))
    check(tmp_path, ours)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--checkpoint {0}", "say what to measure: --tasks copa,piqa,... or --data-path PREFIX"),
        ("--checkpoint {0} --tasks copa --data-path x", "say what to measure"),
        ("--hf {0} --tasks copa --seq-length 9", "--seq-length goes with --checkpoint DIR"),
        ("--hf {0} --tasks copa --stride 4", "--stride 4 goes with --data-path PREFIX"),
        ("--hf {0} --tasks copa --split 8,1,1", "--split 8,1,1 goes with --data-path PREFIX"),
        ("--hf {0} --tasks copa --suffix-from 2", "--suffix-from 2.0 goes with --data-path"),
        ("--hf {0} --tasks copa --breakdown", "--breakdown goes with --data-path PREFIX"),
        ("--hf {0} --data-path x --include-path y", "--include-path y goes with --tasks A,B"),
        ("--hf {0} --data-path x --data-dir y", "--data-dir y goes with --tasks A,B"),
        ("--hf {0} --data-path x --prompt-style paper", "--prompt-style paper goes with --tasks"),
        ("--hf {0} --data-path x --too-long stop", "--too-long stop goes with --tasks A,B"),
        ("--hf {0} --data-path x --samples {0}/a", "--samples {0}/a goes with --tasks A,B"),
        ("--hf {0} --data-path x --markdown {0}/a", "--markdown {0}/a goes with --tasks A,B"),
        ("--hf {0} --tasks a --allow-tokenizer-mismatch", "-mismatch goes with --data-path"),
        ("--checkpoint {0} --data-path x --device cpu", "--device cpu goes with --hf DIR"),
        ("--hf {0} --data-path x --bf16", "--bf16 is not a flag of evaluate.py --hf"),
        ("--hf {0} --tasks copa --limit 0", "--limit 0: give 1 or more"),
        ("--hf {0} --tasks copa --batch-size 0", "--batch-size 0: give 1 or more"),
        ("--hf {0} --data-path x --stride 0", "--stride 0: give 1 or more"),
        ("--hf {0} --data-path x --seq-length 0", "--seq-length 0: give 1 or more"),
        ("--hf {0} --data-path x --output {0}/a/b", "--output {0}/a/b: the folder {0}/a does not"),
        ("--hf {0} --tasks copa --samples {0}/a/b", "--samples {0}/a/b: the folder {0}/a does"),
        ("--hf {0} --tasks copa --markdown {0}/a/b", "--markdown {0}/a/b: the folder {0}/a does"),
    ],
)
def test_flags_that_do_not_go_together(tmp_path: Path, words: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        cli.parse(words.format(tmp_path).split())
    assert message.format(tmp_path) in str(caught.value)


def test_megatrons_flags_are_left_to_it(tmp_path: Path) -> None:
    words = f"--checkpoint {tmp_path} --tasks copa --seq-length 9 --tensor-model-parallel-size 2"
    options, rest = cli.parse(words.split())
    assert (options.seq_length, rest) == (9, ["--tensor-model-parallel-size", "2"])


def test_what_an_exported_folder_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_language_model(tmp_path, "smlp_deterministic")
    options, _ = cli.parse(f"--hf {tmp_path} --data-path x".split())
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    with pytest.raises(UsageError, match="copy the tokenizer's files into it"):
        cli.evaluate(options, [])
    options, _ = cli.parse(f"--hf {folder} --data-path x --seq-length {LONGEST + 1}".split())
    with pytest.raises(UsageError, match=f"--seq-length {LONGEST + 1}: --hf .* has {LONGEST} pos"):
        cli.evaluate(options, [])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="runs in one process: leave out torchrun"):
        cli.evaluate(options, [])


def test_a_report_has_shares_in_percent_beside_the_papers() -> None:
    scores = {"acc": reports.Score(0.5, 0.0217), "acc_norm": reports.Score(0.75, None)}
    others = {"acc": reports.Score(1.0, 0.0), "perplexity": reports.Score(25.3, 0.1)}
    results = [
        reports.TaskResult("copa_paper", 100, scores, "1.0"),
        reports.TaskResult("capitals", 7, others, "0"),
    ]
    assert (
        reports.as_markdown(results, model="runs/a")
        == """\
# Zero-shot evaluation of runs/a

## Measured here

| task | metric | value | standard error | examples |
|---|---|---:|---:|---:|
| copa_paper | acc | 50.0% | 2.2% | 100 |
| copa_paper | acc_norm | 75.0% | n/a | 100 |
| capitals | acc | 100.0% | 0.0% | 7 |
| capitals | perplexity | 25.3000 | 0.1000 | 7 |

## Reported by the paper, not measured here

arXiv 2203.06850, models of about 10B parameters, in %; n/a: no source known. The metric
is the one above that we read the column as.

| model | copa (acc) |
|---|---:|
| BASE 10B | 63.0 |
| HASH 10B | 64.0 |
| GShard 9B | 76.0 |
| Switch 9B | 75.0 |
| sMLP-deterministic 9.4B | 79.0 |
"""
    )


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
    half = ["--suffix-from", "0.5", "--seq-length", "32", "--limit", "2"]
    outputs.append(tmp_path / "half.json")
    commands.append([*commands[1], *half, "--output", str(outputs[2])])
    log = tmp_path / "log"
    launch_calls(evaluate_all, commands, processes=1, log=log)
    assert log.read_text(encoding="utf-8").count("suffix perplexity: ") == 3
    ours, theirs, some = (json.loads(output.read_text(encoding="utf-8")) for output in outputs)
    assert (some["suffix_from"], some["seq_length"], some["limit"]) == (16, 32, 2)
    assert (ours.pop("checkpoint"), ours.pop("iteration")) == (str(one.checkpoint), 3)
    assert theirs.pop("hf") == str(one.exported)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert value == ours[name] or value == pytest.approx(ours[name], rel=1e-5), name
