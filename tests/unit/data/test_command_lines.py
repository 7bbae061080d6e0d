"""The tools as a user starts them: quick, quiet, and with the right exit codes."""

import argparse
import contextlib
import importlib
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from data_helpers import BYTE_FLAGS, PYTHON, ROOT, Run, assert_same_pair, small_files
from support.launches import run_command

from megatron_smlp import __version__, commands
from megatron_smlp.data.pairs import inspect_cli, merge_cli
from megatron_smlp.data.prepare import preprocess_cli
from megatron_smlp.data.prepare import train_tokenizer_cli as tokenizer_training
from megatron_smlp.errors import DataError, UsageError
from megatron_smlp.program import run_tool
from megatron_smlp.signals import is_interruption

TOOLS = ("preprocess_data", "merge_datasets", "inspect_dataset", "train_tokenizer")
Capture, Patch = pytest.CaptureFixture[str], pytest.MonkeyPatch


def test_nothing_heavy_is_imported(corpus: Path, tmp_path: Path):
    flags = ["--input", str(corpus), "--output-prefix", str(tmp_path / "data"), *BYTE_FLAGS]
    program = f"""
import contextlib, runpy, sys
for tool in {TOOLS}:
    sys.argv = [tool, "--help"]
    with contextlib.suppress(SystemExit):
        runpy.run_path(f"{ROOT}/tools/{{tool}}.py", run_name="__main__")
slow = {{"numpy", "torch", "megatron", "tokenizers", "transformers", "nltk", "rich"}}
assert not slow & set(sys.modules), slow & set(sys.modules)
from megatron_smlp.data.prepare.preprocess_cli import main
main({flags!r})
assert not {{"torch", "megatron", "transformers"}} & set(sys.modules)
"""
    assert run_command([PYTHON, "-c", program]).stdout.count("usage:") == len(TOOLS)


def test_flags_of_megatron_are_accepted_with_a_note(corpus: Path, tmp_path: Path, capsys: Capture):
    flags = (
        f"--input {corpus} --output-prefix {tmp_path}/data --partitions 4 --log-interval 100 "
        "--keep-sequential-samples --dataset-impl mmap --chunk-size 25 --find-optimal-num-workers "
        "--workers-to-check 1 2 --performance-dir folder"
    )
    assert preprocess_cli.main([*flags.split(), *BYTE_FLAGS]) == 0
    assert capsys.readouterr().err.count("is accepted and ignored") == 8


COMMANDS = {
    name: start.args[0] for name, start in vars(commands).items() if isinstance(start, partial)
}
"""Maps each command to its tool's module."""
IN_DATA_MD = ("preprocess", "merge_datasets", "inspect_dataset", "train_tokenizer")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_is_in_the_documentation(command: str):
    """Flags of data preparation are in docs/data.md, those of other tools in some page."""
    pages = [ROOT / "docs" / "data.md"]
    if command not in IN_DATA_MD:
        pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    flags = _flags(importlib.import_module(f"megatron_smlp.{COMMANDS[command]}"))
    missing = {flag for flag in flags if not re.search(rf"(?<![\w-]){flag}(?![\w-])", text)}
    assert missing == set()


def _flags(tool: Any) -> set[str]:
    actions = list(tool.build_parser()._actions)
    for action in list(actions):
        if isinstance(action.choices, dict):  # Subcommands, as of inspect_dataset.
            actions += [each for command in action.choices.values() for each in command._actions]
    return {flag for action in actions if action.help != "==SUPPRESS==" for flag in _long(action)}


def _long(action: argparse.Action) -> list[str]:
    return [flag for flag in action.option_strings if flag.startswith("--") and flag != "--help"]


def test_sigterm_ends_the_run_and_its_workers(corpus: Path, tmp_path: Path):
    pipe, prefix = tmp_path / "pipe", tmp_path / "data"
    os.mkfifo(pipe)
    flags = ["--input", corpus, pipe, "--output-prefix", prefix, *BYTE_FLAGS, "--workers", 2]
    command = [PYTHON, str(ROOT / "tools/preprocess_data.py"), *map(str, flags)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    with pipe.open("wb", buffering=0) as stream:  # Opens once the tool has read the first file.
        stream.write(b"\n")
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        _, message = process.communicate(timeout=30)
    assert process.returncode == 130
    assert message == "interrupted: nothing was written\n"
    assert not list(tmp_path.glob("data*"))


def test_no_room_is_one_line_that_names_the_file(
    corpus: Path, tmp_path: Path, run: Run, capsys: Capture
):
    run(corpus, tmp_path / "data", *BYTE_FLAGS)
    data, full = tmp_path / "data_text_document", tmp_path / "full"
    kept = {path.name for path in tmp_path.iterdir()} | {"full"}
    tools: list[tuple[Any, list[object]]] = [
        (preprocess_cli, ["--input", corpus, "--output-prefix", full / "x", *BYTE_FLAGS]),
        (merge_cli, ["--input", data, "--output-prefix", full / "x"]),
        (inspect_cli, ["split", data, "--output-prefix", full / "x", "--weights", 1, 1, 1]),
        (inspect_cli, ["stats", data, "--png", full / "x"]),
        (tokenizer_training, ["--input", corpus, "--vocab-size", 300, "--output", full / "x"]),
    ]
    for tool, flags in tools:
        shutil.rmtree(full, ignore_errors=True)
        full.mkdir()
        with small_files(500), pytest.raises(SystemExit) as end:
            run_tool(lambda tool=tool, flags=flags: tool.main([str(flag) for flag in flags]))
        assert end.value.code == 1
        said = capsys.readouterr().err
        assert re.fullmatch(rf"\S+: error: {full}/\S+: File too large\n", said), (tool, said)
        assert [path for path in full.rglob("*") if path.is_file()] == [], tool
        assert {path.name for path in tmp_path.iterdir()} == kept


PREPARE, TRAIN = (preprocess_cli, "--output-prefix data"), (tokenizer_training, "--output t")
REFUSED = [
    *((*PREPARE, f"--output-prefix={name}", r"as .*/NAME") for name in ("", ".", "folder/.")),
    *((*PREPARE, f"--input={name}", "--input") for name in ("none.jsonl", "*.jsonl", "")),
    (*PREPARE, "--tokenizer-hf-no-use-fast", "--tokenizer-hf-no-use-fast"),
    (*PREPARE, "--workers 0", "--workers 0"),
    (*PREPARE, "--tokenizer-type GPT2BPETokenizer", "--vocab-file"),
    (*PREPARE, "--tokenizer-type GPT2BPETokenizer --vocab-file none", "--vocab-file none"),
    (*PREPARE, "--tokenizer-type HuggingFaceTokenizer", "--tokenizer-model"),
    (*PREPARE, "--tokenizer-type NullTokenizer", "--vocab-size"),
    (*TRAIN, "--vocab-size 256", "yields 257 entries"),
    (*TRAIN, "--vocab-size 50000", r"yields \d+ entries"),
]


@pytest.mark.parametrize(("tool", "output", "flags", "named"), REFUSED)
def test_what_is_refused_leaves_nothing(
    corpus: Path, tmp_path: Path, monkeypatch: Patch, tool: Any, output: str, flags: str, named: str
):
    monkeypatch.chdir(tmp_path)
    tokenizer = BYTE_FLAGS if tool is preprocess_cli else []
    with pytest.raises((DataError, UsageError), match=named):
        tool.main(["--input", str(corpus), *output.split(), *tokenizer, *flags.split()])
    assert list(tmp_path.iterdir()) == []


def test_standard_input(corpus: Path, tmp_path: Path, run: Run):
    run(corpus, tmp_path / "file", *BYTE_FLAGS)
    command = [PYTHON, str(ROOT / "tools/preprocess_data.py"), "--input", "-", *BYTE_FLAGS]
    with corpus.open("rb") as stream:
        writer = subprocess.Popen(["cat"], stdin=stream, stdout=subprocess.PIPE)
        subprocess.run(
            [*command, "--output-prefix", str(tmp_path / "pipe")], stdin=writer.stdout, check=True
        )
    assert writer.wait() == 0
    assert_same_pair(tmp_path / "pipe_text_document", tmp_path / "file_text_document")


def test_a_tokenizer_is_trained_without_bad_records(tmp_path: Path, corpus: Path):
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(corpus.read_bytes() + b"bad\n")
    flags = ["--input", str(bad), "--vocab-size", "300", "--output", str(tmp_path / "t")]
    with pytest.raises(DataError, match=r"bad\.jsonl:301: .*\[bad_json\]"):
        tokenizer_training.main(flags)
    tokenizer_training.main([*flags, "--on-error", "skip"])
    assert (tmp_path / "t" / "tokenizer.json").exists()


def test_run_tool(capsys: Capture, monkeypatch: Patch):
    monkeypatch.setattr(sys, "argv", ["tools/some.py"])

    def fails(error: BaseException) -> Callable[[], None]:
        def main() -> None:
            raise error

        return main

    def closed_by_ctrl_c() -> None:
        """Native code swallowed the interruption, then raised an error about what it had closed."""
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise ValueError("read of closed file")

    missing = FileNotFoundError(2, "No such file or directory", "x.bin")
    cases: list[tuple[Any, int, str]] = [
        (fails(UsageError("a")), 2, "some.py: error: a\n"),
        (fails(DataError("a\nb")), 1, "some.py: error: a b\n"),
        (fails(missing), 1, "some.py: error: x.bin: No such file or directory\n"),
        (fails(KeyboardInterrupt()), 130, "some.py: interrupted\n"),
        (closed_by_ctrl_c, 130, "some.py: interrupted\n"),
        (fails(BrokenPipeError()), 0, ""),
    ]
    stdout = sys.stdout
    for main, code, message in cases:
        with pytest.raises(SystemExit) as end:
            run_tool(main)
        sys.stdout = stdout
        assert end.value.code == code
        assert capsys.readouterr().err == message
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not is_interruption(ValueError())


def test_what_is_there_is_replaced_on_demand_only(corpus: Path, tmp_path: Path):
    argv = ["--input", str(corpus), "--output-prefix", str(tmp_path / "data"), *BYTE_FLAGS]
    assert preprocess_cli.main(argv) == 0
    before = (tmp_path / "data_text_document.bin").stat().st_mtime_ns
    with pytest.raises(DataError, match=r"data_text_document\.bin already exists; .*--overwrite"):
        preprocess_cli.main(argv)
    assert preprocess_cli.main([*argv, "--resume"]) == 0
    assert (tmp_path / "data_text_document.bin").stat().st_mtime_ns == before
    assert preprocess_cli.main([*argv, "--overwrite"]) == 0
    assert (tmp_path / "data_text_document.bin").stat().st_mtime_ns > before
    argv = ["--input", str(corpus), "--output", str(tmp_path / "bpe"), "--vocab-size", "300"]
    tokenizer_training.main(argv)
    with pytest.raises(DataError, match=r"bpe already has a tokenizer"):
        tokenizer_training.main(argv)
    tokenizer_training.main([*argv, "--overwrite"])


@pytest.mark.parametrize("tool", sorted(path.stem for path in (ROOT / "tools").glob("*.py")))
def test_every_tool_tells_its_version_and_how_it_is_used(
    tool: str, monkeypatch: Patch, capsys: Capture
):
    for flag, said in (("--version", f"megatron_smlp {__version__}\n"), ("--help", "usage: ")):
        monkeypatch.setattr(sys, "argv", [f"{tool}.py", flag])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "tools" / f"{tool}.py"), run_name="__main__")
        assert not end.value.code
        shown = capsys.readouterr().out
        assert shown.startswith(said)
