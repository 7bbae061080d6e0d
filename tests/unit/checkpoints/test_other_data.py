"""A run resumes on changed data: another dataset under the old name."""

import json
import os
import random
from pathlib import Path

import pytest
from support.checkpoints import RUN, carry_on
from support.in_process import MINIMAL
from support.launches import start_program, wait_for_line

from megatron_smlp.checkpoints.folders import iteration_folder, iterations
from megatron_smlp.checkpoints.run_record import read_run_record
from megatron_smlp.data.pairs.content import content_of
from megatron_smlp.data.prepare import preprocess_cli
from megatron_smlp.errors import UsageError

TOKENIZER = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "100"]


def _write(prefix: Path, seed: int) -> str:
    """Write a dataset of 40 documents of 30 ids, always of the same size; return its prefix."""
    rng = random.Random(seed)
    source = prefix.with_suffix(".jsonl")
    with source.open("w", encoding="utf-8") as stream:
        for _ in range(40):
            ids = " ".join(str(rng.randrange(100)) for _ in range(30))
            stream.write(json.dumps({"text": ids}) + "\n")
    flags = ["--input", str(source), "--output-prefix", str(prefix), *TOKENIZER, "--overwrite"]
    assert preprocess_cli.main(flags) == 0
    return f"{prefix}_text_document"


def _flags(prefix: str, run: Path) -> str:
    base = " ".join(MINIMAL.split()).replace("--mock-data", f"--data-path {prefix}")
    return f"{base} {RUN} --split 900,100,0 --save {run}"


def test_a_resume_on_other_data_wants_a_flag(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    prefix, run = _write(tmp_path / "data", seed=1), tmp_path / "run"
    flags = _flags(prefix, run)
    carry_on(f"{flags} --exit-interval 2")
    record = read_run_record(iteration_folder(run, 2)) or {}
    assert record["data"] == {prefix: content_of(prefix)}
    _write(tmp_path / "data", seed=2)
    with pytest.raises(UsageError, match=rf"{prefix} holds other data than at iteration 2 of"):
        carry_on(flags)
    carry_on(f"{flags} --allow-data-mismatch --exit-interval 4")
    assert "WARNING: " + prefix + " holds other data than at iteration 2" in capfd.readouterr().out
    carry_on(flags)
    assert "holds other data" not in capfd.readouterr().out
    assert iterations(run) == [2, 4, 6]
    _write(tmp_path / "data", seed=3)
    with pytest.raises(UsageError, match="holds other data than at iteration 4"):
        carry_on(f"--load {run} --use-checkpoint-args --ckpt-step 4")  # it was allowed once only
    carry_on(f"{_flags(prefix, tmp_path / 'tuned')} --load {run} --finetune --train-iters 2")
    assert iterations(tmp_path / "tuned") == [2]


def test_files_named_relatively_are_found_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """A checkpoint records absolute paths of the data and of a tokenizer's folder."""
    prefix = _write(tmp_path / "data", seed=1)
    (tmp_path / "tokenizer").mkdir()
    monkeypatch.chdir(tmp_path)
    flags = _flags(Path(prefix).name, tmp_path / "run")
    carry_on(f"{flags} --tokenizer-model tokenizer --exit-interval 2")
    record = read_run_record(iteration_folder(tmp_path / "run", 2)) or {}
    assert record["flags"]["data_path"] == [prefix]
    assert record["tokenizer"]["tokenizer_model"] == str(tmp_path / "tokenizer")
    monkeypatch.chdir("/")
    carry_on(f"--load {tmp_path / 'run'} --use-checkpoint-args")
    assert "changed since" not in capfd.readouterr().out
    assert iterations(tmp_path / "run") == [2, 4, 6]


def test_a_dataset_cut_short_under_a_run_ends_it_in_one_line(tmp_path: Path):
    prefix, log = _write(tmp_path / "data", seed=1), tmp_path / "log"
    flags = f"{_flags(prefix, tmp_path / 'run')} --train-iters 100000"
    process = start_program(flags.split(), log=log)
    try:
        wait_for_line("iteration 5/", log, process)
        os.truncate(f"{prefix}.bin", 1000)
        process.join(60)
    finally:
        process.kill()
    said = log.read_text(encoding="utf-8")
    assert process.exitcode == 1, said
    message = f"error: the dataset {prefix!r} changed while this run was reading it"
    assert message in said.splitlines()[-1]
    assert "Traceback" not in said
