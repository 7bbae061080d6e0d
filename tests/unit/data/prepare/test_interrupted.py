"""A run killed at any moment resumes where it stopped and writes the same bytes."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import pytest
from data_helpers import BYTE_FLAGS, PYTHON, ROOT, Run, make_documents, write_jsonl

from megatron_smlp.data.pairs import writer as pair_writer
from megatron_smlp.data.prepare import output, preprocess_cli, preprocessing
from megatron_smlp.data.prepare.output import PartialOutput
from megatron_smlp.errors import DataError

SUFFIXES = ("_text_document.bin", "_text_document.idx", ".rejected.jsonl", ".json")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a corpus with one bad line in ten; use small chunks, with commits every few."""
    monkeypatch.setattr("megatron_smlp.data.prepare.sources.CHUNK_BYTES", 2000)
    monkeypatch.setattr("megatron_smlp.data.prepare.compression.BLOCK_BYTES", 500)
    monkeypatch.setattr(preprocessing, "SHARD_SECONDS", 0.0)
    path = write_jsonl(tmp_path / "source.jsonl", make_documents(400, seed=5))
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[::10] = ["bad"] * len(lines[::10])
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


FLAGS = [*BYTE_FLAGS, "--append-eod", "--on-error", "skip"]


def _outputs(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}{suffix}").read_bytes() for suffix in SUFFIXES]


class _KilledError(BaseException):
    """Ends a run without the cleanup that it does for an `Exception`."""


@contextlib.contextmanager
def _killed(place: object, method: str, calls: int) -> Iterator[pytest.MonkeyPatch]:
    """Kill the run at its next call of this method after `calls` calls."""
    left = [calls]
    original = getattr(place, method)

    def counted(*args: object, **kwargs: object) -> object:
        if left[0] == 0:
            raise _KilledError
        left[0] -= 1
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, method, counted)
        with pytest.raises(_KilledError):
            yield patch


STEPS = [("write", 0), ("write", 7), ("commit", 0), ("commit", 7), ("finish", 0), ("publish", 0)]


@pytest.mark.parametrize(("method", "calls"), STEPS)
def test_a_run_stopped_at_each_step(
    run: Run, tmp_path: Path, source: Path, method: str, calls: int
):
    whole, prefix = tmp_path / "a" / "data", tmp_path / "b" / "data"
    run(source, whole, *FLAGS)
    with _killed(PartialOutput, method, calls):
        run(source, prefix, *FLAGS)
    assert not Path(f"{prefix}_text_document.idx").exists()
    run(source, prefix, *FLAGS, "--resume")
    assert _outputs(prefix) == _outputs(whole)
    assert not Path(f"{prefix}.partial").exists()


@pytest.mark.parametrize("calls", range(4))
def test_a_run_stopped_between_two_names(run: Run, tmp_path: Path, source: Path, calls: int):
    """Killed while naming the rejected list, `.bin` and `.idx`, or after naming all."""
    whole, prefix = tmp_path / "a" / "data", tmp_path / "b" / "data"
    run(source, whole, *FLAGS)
    with _killed(pair_writer, "link_durably", calls) as patch:
        patch.setattr(output, "link_durably", pair_writer.link_durably)
        patch.setattr(output, "remove_locked", _die)
        run(source, prefix, *FLAGS)
    run(source, prefix, *FLAGS, "--resume")
    assert _outputs(prefix) == _outputs(whole)


def test_what_a_kill_left_behind_does_not_reach_the_published_files(
    run: Run, tmp_path: Path, source: Path
):
    """Killed after the journal is gone, while the folder still hard-links the published files."""
    prefix = tmp_path / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output, "remove_locked", _die)
        with pytest.raises(_KilledError):
            run(source, prefix, *FLAGS)
    assert (tmp_path / "data.partial" / "0.bin").samefile(f"{prefix}_text_document.bin")
    before = _outputs(prefix)
    source.write_text("bad\n" + json.dumps({"text": "another corpus"}))
    with _killed(PartialOutput, "publish", 0):
        run(source, prefix, *FLAGS, "--overwrite")
    assert _outputs(prefix) == before


def _die(_: Path, lock: IO[bytes]) -> None:
    lock.close()  # as the kernel does
    raise _KilledError


def test_two_at_work_on_one_output(run: Run, tmp_path: Path, source: Path):
    first = PartialOutput(f"{tmp_path}/data", pairs={}, level="document", dtype=np.dtype("uint16"))
    with first, pytest.raises(DataError, match=r"another process is .*data'.*partial/lock"):
        run(source, tmp_path / "data", *FLAGS)


def test_other_flags_or_input_are_refused(run: Run, tmp_path: Path, source: Path):
    with _killed(PartialOutput, "write", 3):
        run(source, tmp_path / "data", *FLAGS)
    with pytest.raises(DataError, match="other flags, tokenizer files or input"):
        run(source, tmp_path / "data", *FLAGS, "--resume", "--json-keys", "id")
    source.write_text(source.read_text() + '\n{"text": "more"}')
    with pytest.raises(DataError, match="other flags, tokenizer files or input"):
        run(source, tmp_path / "data", *FLAGS, "--resume")
    run(source, tmp_path / "data", *FLAGS)


def test_a_finished_run_whose_pair_is_gone_is_done_again(run: Run, tmp_path: Path, source: Path):
    run(source, tmp_path / "data", *FLAGS)
    for path in tmp_path.glob("data_text_document.*"):
        path.unlink()
    assert not run(source, tmp_path / "data", *FLAGS, "--resume").already_complete
    assert (tmp_path / "data_text_document.idx").exists()


@pytest.mark.parametrize("change", ["flags", "input", "cut"])
def test_another_finished_run_is_not_replaced(run: Run, tmp_path: Path, source: Path, change: str):
    run(source, tmp_path / "data", *FLAGS)
    pair = tmp_path / "data_text_document.bin"
    flags = [*FLAGS, "--vocab-size", 300] if change == "flags" else FLAGS
    if change == "input":
        source.write_text(source.read_text() + '{"text": "more"}\n')
    if change == "cut":
        pair.write_bytes(pair.read_bytes()[:-100])
    before = pair.read_bytes()
    with pytest.raises(DataError, match=r"damaged or from other flags, .* give --over"):
        run(source, tmp_path / "data", *flags, "--resume")
    assert pair.read_bytes() == before
    done = run(source, tmp_path / "data", *flags, "--resume", "--overwrite")
    assert not done.already_complete
    again = run(source, tmp_path / "data", *flags, "--resume", "--workers", 2)
    assert again.already_complete
    assert again.counts == done.counts


def test_a_tokenizer_of_other_rules_is_another_one(
    run: Run, tmp_path: Path, tokenizer_folder: Path
):
    """The vocabulary is the same, but gives other ids."""
    folder = shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")
    flags = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", folder]
    source = write_jsonl(tmp_path / "source.jsonl", ["Hello"])
    run(source, tmp_path / "data", *flags)
    rules = json.loads((folder / "tokenizer.json").read_text())
    rules["normalizer"] = {"type": "Lowercase"}
    (folder / "tokenizer.json").write_text(json.dumps(rules))
    with pytest.raises(DataError, match="from other flags, tokenizer files or input"):
        run(source, tmp_path / "data", *flags, "--resume")


def test_one_bad_record_does_not_cost_the_work_before_it(
    run: Run, tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
):
    lines = source.read_text(encoding="utf-8").splitlines() * 4
    good = [line for line in lines if line != "bad"]
    source.write_text("\n".join([*good[:1000], "bad", *good[1000:]]), encoding="utf-8")
    with pytest.raises(DataError, match=r"shards are kept; add --on-error skip --resume"):
        run(source, tmp_path / "data", *FLAGS, "--on-error", "raise")
    argv = ["--input", source, "--output-prefix", tmp_path / "data", *FLAGS, "--resume"]
    preprocess_cli.main([str(word) for word in argv])
    says = re.search(r"([\d.]+) MB of text \(([\d.]+) of them kept", capsys.readouterr().out)
    assert says is not None
    size, kept = map(float, says.groups())
    assert 0 < kept < size == round(source.stat().st_size / 1e6, 1)
    run(source, tmp_path / "whole", *FLAGS)
    ours, theirs = _outputs(tmp_path / "data"), _outputs(tmp_path / "whole")
    assert ours[:3] == theirs[:3]


def test_a_pipe_is_not_resumed(run: Run, tmp_path: Path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(DataError, match=r"--resume: .*pipe cannot be read again; give a file"):
        run(pipe, tmp_path / "data", *FLAGS, "--resume")


def test_the_manifest_of_another_pair_is_not_replaced(run: Run, tmp_path: Path, source: Path):
    run(source, tmp_path / "data", *FLAGS)
    before = (tmp_path / "data.json").read_bytes()
    other = write_jsonl(tmp_path / "titles.jsonl", ["a"], key="title")
    with pytest.raises(DataError, match=r"data\.json describes data_text_document and would be"):
        run(other, tmp_path / "data", *FLAGS, "--json-keys", "title")
    assert (tmp_path / "data.json").read_bytes() == before
    assert not (tmp_path / "data.partial").exists()


def test_a_corpus_of_the_name_of_the_manifest_is_not_replaced(run: Run, tmp_path: Path):
    source = write_jsonl(tmp_path / "books.json", ["a", "b"])
    before = source.read_bytes()
    with pytest.raises(DataError, match=r"books\.json exists and is not a dataset manifest"):
        run(source, tmp_path / "books", *FLAGS)
    assert source.read_bytes() == before


def test_kill_9_at_random_moments(run: Run, tmp_path: Path, source: Path):
    """Real processes kill themselves at work, until one gets through."""
    source.write_bytes((source.read_bytes() + b"\n") * 6)
    program = tmp_path / "dies.py"
    program.write_text(f"""
import os, signal, sys, threading, time
sys.path[:0] = [{str(ROOT)!r}]
from megatron_smlp.data.prepare import preprocessing, sources
from megatron_smlp.program import run_tool
from megatron_smlp.data.prepare.preprocess_cli import main
preprocessing.SHARD_SECONDS = 0.0
sources.CHUNK_BYTES = 20_000

def read_and_die(*args, **kwargs):
    seconds = float(os.environ["SECONDS_TO_LIVE"])
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
    timer.daemon = True
    timer.start()
    for chunk in sources.read_chunks(*args, **kwargs):
        time.sleep(0.01)  # so that no machine is through before its time is up
        yield chunk

preprocessing.read_chunks = read_and_die
if __name__ == "__main__":
    run_tool(main)
""")
    command = [PYTHON, str(program), "--input", str(source), "--output-prefix"]
    command += [str(tmp_path / "killed"), *FLAGS, "--workers", "2", "--resume"]
    rng = random.Random(0)
    codes: list[int] = []
    while not codes or codes[-1] == -signal.SIGKILL:
        seconds = rng.uniform(0.005, 0.1) if len(codes) < 2 else 1000.0
        environment = {**os.environ, "SECONDS_TO_LIVE": str(seconds)}
        codes.append(subprocess.run(command, env=environment, timeout=60, check=False).returncode)
    assert codes[-1] == 0
    assert len(codes) > 1
    run(source, tmp_path / "whole", *FLAGS)
    ours, theirs = _outputs(tmp_path / "killed"), _outputs(tmp_path / "whole")
    assert ours[:3] == theirs[:3]
    assert ours[3] == theirs[3].replace(b"whole", b"killed")
