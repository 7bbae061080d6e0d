"""A run computes on the CPU if there is no GPU, or if the user chose so; never by accident."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pretrain_smlp
from megatron_smlp.errors import UsageError
from megatron_smlp.platform import choice


@pytest.fixture
def nvidia(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pretend that the kernel's driver knows a GPU that torch does not find."""
    (tmp_path / "0000:01:00.0").mkdir()
    monkeypatch.setattr(choice, "DRIVER", tmp_path)
    monkeypatch.delenv(choice.VISIBLE, raising=False)
    return tmp_path


def test_a_whole_command_line_meets_it(nvidia: Path, parse: Callable[..., Any]):
    with pytest.raises(UsageError, match="has an NVIDIA device"):
        parse("--architecture gmlp")
    assert parse("--architecture gmlp --platform cpu").platform == "cpu"


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_hidden_gpus_are_a_choice(nvidia: Path, hidden: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(choice.VISIBLE, hidden)
    choice.check()


def test_without_a_device_there_is_nothing_to_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(choice.VISIBLE, raising=False)
    for folder in (tmp_path, tmp_path / "missing"):
        monkeypatch.setattr(choice, "DRIVER", folder)
        choice.check()


@pytest.mark.parametrize(
    ("flags", "hides"),
    [
        ("--platform cpu", True),
        ("--lr 1 --platform=cpu --bf16", True),
        ("--platform auto", False),
        ("--log-dir cpu", False),
        ("--config {file}", True),
        ("--config {file} --platform auto", False),
    ],
)
def test_the_command_line_or_a_file_hides_the_gpus(
    flags: str, hides: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "cpu.yaml").write_text("platform: cpu", encoding="utf-8")
    monkeypatch.setenv(choice.VISIBLE, "0,1")
    monkeypatch.setattr(pretrain_smlp, "end_with_agent", lambda: sys.exit(9))
    with pytest.raises(SystemExit):
        pretrain_smlp.main(flags.format(file=tmp_path / "cpu.yaml").split())
    assert os.environ[choice.VISIBLE] == ("" if hides else "0,1")
