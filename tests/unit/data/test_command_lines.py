"""The tools as a user starts them: quick, quiet, and with the right exit codes."""

import argparse
import contextlib
import importlib
import json
import os
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from data_helpers import BYTE_FLAGS, PYTHON, ROOT, assert_same_pair, write_jsonl

from megatron_smlp import __version__, commands
from megatron_smlp.data import hash_table_cli
from megatron_smlp.data.pairs import inspect_cli, merge_cli
from megatron_smlp.data.prepare import preprocess_cli
from megatron_smlp.data.prepare import train_tokenizer_cli as tokenizer_training
from megatron_smlp.data.prepare.preprocessing import Summary
from megatron_smlp.errors import DataError, UsageError
from megatron_smlp.program import run_tool
from megatron_smlp.signals import is_interruption

TOOLS = (
    "preprocess_data",
    "merge_datasets",
    "inspect_dataset",
    "train_tokenizer",
    "build_hash_table",
)


def test_help_imports_nothing_heavy() -> None:
    program = f"""
import contextlib, runpy, sys
for tool in {TOOLS}:
    sys.argv = [tool, "--help"]
    with contextlib.suppress(SystemExit):
        runpy.run_path(f"{ROOT}/tools/{{tool}}.py", run_name="__main__")
slow = {{"numpy", "torch", "megatron", "tokenizers", "transformers", "nltk", "rich"}}
assert not slow & set(sys.modules), slow & set(sys.modules)
"""
    done = subprocess.run([PYTHON, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage:") == len(TOOLS)


def test_preprocessing_imports_neither_torch_nor_megatron(corpus: Path, tmp_path: Path) -> None:
    flags = ["--input", str(corpus), "--output-prefix", str(tmp_path / "data"), *BYTE_FLAGS]
    program = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}]
from megatron_smlp.data.prepare.preprocess_cli import main
main({flags!r})
assert not {{"torch", "megatron", "transformers"}} & set(sys.modules)
"""
    subprocess.run([PYTHON, "-c", program], check=True, capture_output=True)


def test_a_wrong_flag_exits_2() -> None:
    command = [PYTHON, str(ROOT / "tools" / "merge_datasets.py"), "--no-such-flag"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert re.fullmatch(r"merge_datasets\.py: error: .*\n", done.stderr)


def test_flags_of_megatron_are_accepted_with_a_note(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = ["--partitions", "4", "--log-interval", "100", "--keep-sequential-samples"]
    old += ["--dataset-impl", "mmap", "--chunk-size", "25"]
    old += ["--find-optimal-num-workers", "--workers-to-check", "1", "2"]
    old += ["--performance-dir", "folder", "--lang", "german", "--tokenizer-model", "x"]
    flags = ["--input", str(corpus), "--output-prefix", str(tmp_path / "data"), *BYTE_FLAGS, *old]
    assert preprocess_cli.main(flags) == 0
    printed = capsys.readouterr()
    assert printed.err.count("is accepted and ignored") == 10
    assert "300 documents" in printed.out
    assert "by bytes" in printed.out


@pytest.mark.parametrize("flag", ["--vocab-file=x", "--tokenizer-hf-no-use-fast"])
def test_flags_without_an_effect_are_refused(corpus: Path, tmp_path: Path, flag: str) -> None:
    words = ["--input", str(corpus), "--output-prefix", str(tmp_path / "data"), *BYTE_FLAGS]
    with pytest.raises(UsageError, match=flag.partition("=")[0]):
        preprocess_cli.main([*words, flag])


COMMANDS = {
    name: start.args[0] for name, start in vars(commands).items() if isinstance(start, partial)
}
"""Module of each tool, by its command."""
IN_DATA_MD = ("preprocess", "merge_datasets", "inspect_dataset", "train_tokenizer")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_is_in_the_documentation(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of preparing data in docs/data.md, those of other tools in some page."""
    pages = [ROOT / "docs" / "data.md"]
    if command not in IN_DATA_MD:
        pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    flags = _flags(importlib.import_module(f"megatron_smlp.{COMMANDS[command]}"), capsys)
    missing = {flag for flag in flags if not re.search(rf"(?<![\w-]){flag}(?![\w-])", text)}
    assert missing == set()


def _flags(tool: Any, capsys: pytest.CaptureFixture[str]) -> set[str]:
    if not hasattr(tool, "build_parser"):
        with pytest.raises(SystemExit):
            tool.main(["--help"])
        return set(re.findall(r"(?<![\w-])--[a-z][\w-]+", capsys.readouterr().out)) - {"--help"}
    actions = list(tool.build_parser()._actions)
    for action in list(actions):
        if isinstance(action.choices, dict):  # The commands of inspect_dataset, and of others.
            actions += [each for command in action.choices.values() for each in command._actions]
    return {flag for action in actions if action.help != "==SUPPRESS==" for flag in _long(action)}


def _long(action: argparse.Action) -> list[str]:
    return [flag for flag in action.option_strings if flag.startswith("--") and flag != "--help"]


def test_sigterm_ends_the_run_and_its_workers(corpus: Path, tmp_path: Path) -> None:
    pipe, prefix = tmp_path / "pipe", tmp_path / "data"
    os.mkfifo(pipe)
    flags = ["--input", corpus, pipe, "--output-prefix", prefix, *BYTE_FLAGS, "--workers", 2]
    command = [PYTHON, str(ROOT / "tools/preprocess_data.py"), *map(str, flags)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    with pipe.open("wb", buffering=0) as stream:  # Opens when the tool has read the first file.
        stream.write(b"\n")
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        _, message = process.communicate(timeout=30)
    assert process.returncode == 130
    assert message == "interrupted: nothing was written\n"
    assert not list(tmp_path.glob("data*"))


@contextlib.contextmanager
def _small_files(limit: int) -> Iterator[None]:
    """The system refuses what grows beyond `limit` bytes, as a full disk does: without a name."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_room_is_one_line_that_names_the_file(
    corpus: Path, tmp_path: Path, run: Callable[..., Summary], capsys: pytest.CaptureFixture[str]
) -> None:
    run(corpus, tmp_path / "data", *BYTE_FLAGS)
    data, full = tmp_path / "data_text_document", tmp_path / "full"
    kept = {path.name for path in tmp_path.iterdir()} | {"full"}
    tools: list[tuple[Any, list[object]]] = [
        (preprocess_cli, ["--input", corpus, "--output-prefix", full / "x", *BYTE_FLAGS]),
        (merge_cli, ["--input", data, "--output-prefix", full / "x"]),
        (inspect_cli, ["split", data, "--output-prefix", full / "x", "--weights", 1, 1, 1]),
        (inspect_cli, ["stats", data, "--png", full / "x"]),
        (tokenizer_training, ["--input", corpus, "--vocab-size", 300, "--output", full / "x"]),
        (hash_table_cli, ["--data-path", data, "--num-experts", 2, "--output", full / "x"]),
    ]
    for tool, flags in tools:
        shutil.rmtree(full, ignore_errors=True)
        full.mkdir()
        with _small_files(500), pytest.raises(SystemExit) as end:
            run_tool(lambda tool=tool, flags=flags: tool.main([str(flag) for flag in flags]))
        assert end.value.code == 1
        said = capsys.readouterr().err
        assert re.fullmatch(rf"\S+: error: {full}/\S+: File too large\n", said), (tool, said)
        assert [path for path in full.rglob("*") if path.is_file()] == [], tool
        assert {path.name for path in tmp_path.iterdir()} == kept


@pytest.mark.parametrize("prefix", ["", ".", "folder/", "folder/."])
def test_a_prefix_without_a_name(
    corpus: Path, prefix: str, monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"--output-prefix .* as .*/NAME"):
        preprocess_cli.main(["--input", str(corpus), "--output-prefix", prefix, *BYTE_FLAGS])
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_mean_nothing(
    corpus: Path, tmp_path: Path, run: Callable[..., Summary]
) -> None:
    run(corpus, tmp_path / "data", *BYTE_FLAGS)
    data = str(tmp_path / "data_text_document")
    train = ["--input", str(corpus), "--vocab-size", "300", "--output", str(tmp_path / "t")]
    tools: list[tuple[Any, list[str]]] = [
        (inspect_cli, ["sample", data, "--count", "-1"]),
        (inspect_cli, ["sample", data, "--max-tokens", "0"]),
        (inspect_cli, ["split", data, "--weights", "nan"]),
        (tokenizer_training, [*train, "--max-bytes", "nan"]),
        (tokenizer_training, [*train, "--max-bytes", "0"]),
    ]
    before = sorted(tmp_path.iterdir())
    for tool, flags in tools:
        with pytest.raises((DataError, UsageError), match=f"{flags[-2]} {flags[-1]}"):
            tool.main(flags)
    assert sorted(tmp_path.iterdir()) == before


def test_standard_input(corpus: Path, tmp_path: Path, run: Callable[..., Summary]) -> None:
    run(corpus, tmp_path / "file", *BYTE_FLAGS)
    command = [PYTHON, str(ROOT / "tools/preprocess_data.py"), "--input", "-", *BYTE_FLAGS]
    with corpus.open("rb") as stream:
        writer = subprocess.Popen(["cat"], stdin=stream, stdout=subprocess.PIPE)
        subprocess.run(
            [*command, "--output-prefix", str(tmp_path / "pipe")], stdin=writer.stdout, check=True
        )
    assert writer.wait() == 0
    assert_same_pair(tmp_path / "pipe_text_document", tmp_path / "file_text_document")


def test_an_old_dataset_is_replaced_as_a_whole(
    run: Callable[..., Summary], tmp_path: Path, corpus: Path
) -> None:
    source = write_jsonl(tmp_path / "bad.jsonl", ["a"])
    source.write_text(source.read_text() + "bad\n")
    run(source, tmp_path / "data", *BYTE_FLAGS, "--on-error", "skip")
    assert (tmp_path / "data.rejected.jsonl").exists()
    run(corpus, tmp_path / "data", *BYTE_FLAGS)
    assert not (tmp_path / "data.rejected.jsonl").exists()
    assert json.loads((tmp_path / "data.json").read_text())["counts"]["documents"] == 300


class TestTrainingATokenizer:
    def test_transformers_loads_the_folder(self, tokenizer_folder: Path) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_folder))
        assert len(tokenizer) == 320
        assert tokenizer.eos_token == "<|endoftext|>"
        text = "Don't  stop:\n caf\u00e9 \u65e5\u672c\u8a9e \U0001f642"
        assert tokenizer.decode(tokenizer(text).input_ids) == text

    def test_too_small_and_too_large(self, corpus: Path, tmp_path: Path) -> None:
        for size, message in ((256, "at least 257"), (50_000, "has pairs for \\d+ entries only")):
            with pytest.raises((UsageError, DataError), match=message):
                tokenizer_training.train_tokenizer(
                    [str(corpus)], output=str(tmp_path / "t"), vocab_size=size
                )
        assert not (tmp_path / "t").exists()

    def test_bad_records(self, tmp_path: Path, corpus: Path) -> None:
        bad = tmp_path / "bad.jsonl"
        bad.write_bytes(corpus.read_bytes() + b"bad\n")
        flags = ["--input", str(bad), "--vocab-size", "300", "--output", str(tmp_path / "t")]
        with pytest.raises(DataError, match=r"bad\.jsonl:301: .*\[bad_json\]"):
            tokenizer_training.main(flags)
        tokenizer_training.main([*flags, "--on-error", "skip"])
        assert (tmp_path / "t" / "tokenizer.json").exists()


def test_run_tool(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tools/some.py"])

    def fails(error: BaseException) -> Callable[[], None]:
        def main() -> None:
            raise error

        return main

    missing = FileNotFoundError(2, "No such file or directory", "x.bin")
    cases: list[tuple[BaseException, int, str]] = [
        (DataError("a\nb"), 1, "some.py: error: a b\n"),
        (missing, 1, "some.py: error: x.bin: No such file or directory\n"),
        (KeyboardInterrupt(), 130, "some.py: interrupted\n"),
    ]
    for error, code, message in cases:
        with pytest.raises(SystemExit) as end:
            run_tool(fails(error))
        assert end.value.code == code
        assert capsys.readouterr().err == message
    stdout = sys.stdout
    with pytest.raises(SystemExit) as end:
        run_tool(fails(BrokenPipeError()))
    sys.stdout = stdout
    assert end.value.code == 0


@pytest.mark.parametrize("error", [ValueError("read of closed file"), DataError("damaged")])
def test_an_error_that_follows_from_ctrl_c(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Native code let the interruption go, and then complained of what it had closed."""
    monkeypatch.setattr(sys, "argv", ["tools/some.py"])

    def main() -> None:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise error

    with pytest.raises(SystemExit) as end:
        run_tool(main)
    assert end.value.code == 130
    assert capsys.readouterr().err == "some.py: interrupted\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not is_interruption(error)


def test_what_is_there_is_replaced_on_demand_only(corpus: Path, tmp_path: Path) -> None:
    words = ["--input", str(corpus), "--output-prefix", str(tmp_path / "data"), *BYTE_FLAGS]
    assert preprocess_cli.main(words) == 0
    before = (tmp_path / "data_text_document.bin").stat().st_mtime_ns
    with pytest.raises(DataError, match=r"data_text_document\.bin is there already; .*--overwrite"):
        preprocess_cli.main(words)
    assert preprocess_cli.main([*words, "--resume"]) == 0
    assert (tmp_path / "data_text_document.bin").stat().st_mtime_ns == before
    assert preprocess_cli.main([*words, "--overwrite"]) == 0
    assert (tmp_path / "data_text_document.bin").stat().st_mtime_ns > before
    words = ["--input", str(corpus), "--output", str(tmp_path / "bpe"), "--vocab-size", "300"]
    tokenizer_training.main(words)
    with pytest.raises(DataError, match=r"bpe holds a tokenizer already; give --overwrite"):
        tokenizer_training.main(words)
    tokenizer_training.main([*words, "--overwrite"])


@pytest.mark.parametrize("tool", sorted(path.stem for path in (ROOT / "tools").glob("*.py")))
def test_every_tool_tells_its_version_and_how_it_is_used(
    tool: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for flag, said in (("--version", f"megatron_smlp {__version__}\n"), ("--help", "usage: ")):
        monkeypatch.setattr(sys, "argv", [f"{tool}.py", flag])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "tools" / f"{tool}.py"), run_name="__main__")
        assert not end.value.code
        shown = capsys.readouterr().out
        assert shown.startswith(said)
