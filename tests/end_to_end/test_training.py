"""A run as a user makes it: text, tokenizer, dataset, training; and what happens when it fails."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.launches import TIME_LIMIT, records, start_program, wait_for_line

from megatron_smlp.data.prepare import preprocess_cli, train_tokenizer_cli
from megatron_smlp.errors import UsageError

SIZES = (
    "--config configs/cpu/gmlp.yaml --num-layers 2 --hidden-size 32 --ffn-hidden-size 64 "
    "--seq-length 32 --micro-batch-size 2 --global-batch-size 4 --log-interval 1 --eval-iters 2"
)
SENTENCE = "the model mixes every token with what came before it and nothing that comes after"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with a tokenizer, one of another vocabulary, and a dataset of the first."""
    folder: Path = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    texts = [" ".join(draw.choices(SENTENCE.split(), k=80)) for _ in range(200)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "text.jsonl").write_text(lines, encoding="utf-8")
    text = folder / "text.jsonl"
    for name, size in (("tokenizer", 300), ("other", 310)):
        flags = f"--input {text} --vocab-size {size} --output {folder / name}"
        train_tokenizer_cli.main(flags.split())
    flags = f"--input {text} --output-prefix {folder / 'text'} --append-eod --workers 1"
    preprocess_cli.main([*flags.split(), *tokenizer_flags(folder / "tokenizer").split()])
    return folder


def tokenizer_flags(folder: Path) -> str:
    return f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {folder}"


def flags(corpus: Path, *, tokenizer: str = "tokenizer") -> str:
    data = corpus / "text_text_document"
    return f"{SIZES} --data-path {data} {tokenizer_flags(corpus / tokenizer)}"


def run(argv: str, log: Path) -> tuple[int, str]:
    """Run pretrain_smlp.py, and return its exit code and what it prints."""
    process = start_program(argv.split(), log=log)
    process.join(TIME_LIMIT)
    return process.exitcode, log.read_text(encoding="utf-8")


def test_training_on_text_learns_and_reports(corpus: Path, tmp_path: Path) -> None:
    """The start fits on a screen; each logged step has its numbers; the loss falls on real text."""
    argv = f"{flags(corpus)} --train-iters 30 --eval-interval 15 --save {tmp_path} --lr 1e-2"
    code, said = run(argv, tmp_path / "output")
    assert code == 0, said
    lines = said.splitlines()
    first_step = next(i for i, line in enumerate(lines) if line.startswith("iteration 1/30"))
    assert first_step <= 16
    metrics = records(tmp_path)
    trained = [record for record in metrics if "loss" in record]
    assert [record["iteration"] for record in trained] == list(range(1, 31))
    for name in ("learning_rate", "grad_norm", "tokens_per_second", "eta_seconds"):
        assert all(isinstance(record[name], float) for record in trained)
    assert all(0 < record["data_wait_share"] < 1 for record in trained)
    assert trained[-1]["consumed_samples"] == 30 * 4
    assert trained[-1]["loss"] < trained[0]["loss"] - 1
    validated = [record for record in metrics if "validation_loss" in record]
    assert [record["iteration"] for record in validated] == [15, 30]
    assert all(1 < record["validation_perplexity"] < 300 for record in validated)
    assert "end of arguments" in (tmp_path / "megatron.log").read_text(encoding="utf-8")


def test_interrupted_run_saves_and_the_same_command_goes_on(corpus: Path, tmp_path: Path) -> None:
    """On each of these signals: exit 0, a checkpoint of the step reached, then a resume."""
    argv = f"{flags(corpus)} --train-iters 100000 --eval-interval 100000 --save {tmp_path}"
    reached = 0
    for sent in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        log = tmp_path / f"{sent.name}.log"
        process = start_program(argv.split(), log=log)
        try:
            wait_for_line(f"iteration {reached + 5}/", log, process)
            os.kill(process.pid, sent)
            process.join(60)
        finally:
            process.kill()
        output = log.read_text(encoding="utf-8")
        assert process.exitcode == 0, output
        if reached:
            assert f"resumed from iteration {reached} of {tmp_path}\n" in output
        tracker = tmp_path / "latest_checkpointed_iteration.txt"
        saved = int(tracker.read_text(encoding="utf-8"))
        assert saved >= reached + 5
        last = output.splitlines()[-1]
        assert last.startswith(f"stopped at iteration {saved} (a signal): saved to {tmp_path}")
        reached = saved


def test_bad_input_is_one_line_and_exit_code_2(corpus: Path, tmp_path: Path) -> None:
    argv = f"{flags(corpus)} --data-path {corpus / 'absent'}"
    code, said = run(argv, tmp_path / "output")
    assert code == 2, said
    assert [str(corpus / "absent") in line for line in said.splitlines()].count(True) == 1
    assert "Traceback" not in said


def test_data_of_another_vocabulary_or_none_is_refused(
    corpus: Path, parse: Callable[..., Any]
) -> None:
    from megatron_smlp.training.data import check_data

    argv = f"{flags(corpus, tokenizer='other')} --train-iters 2"
    with pytest.raises(UsageError, match="written with another tokenizer"):
        check_data(parse(argv, base=""))
    check_data(parse(f"{argv} --allow-tokenizer-mismatch", base=""))
    check_data(parse(f"{flags(corpus)} --train-iters 2", base=""))
    argv = f"{SIZES} --train-iters 2 {tokenizer_flags(corpus / 'tokenizer')}"
    with pytest.raises(UsageError, match="--data-path is missing"):
        check_data(parse(argv, base=""))
