"""Progress of a command, on a terminal and in a log file."""

import sys
from types import SimpleNamespace

import pytest
import torch

from megatron_smlp import progress
from megatron_smlp.checkpoints.tensors import Spec, tensors_of
from megatron_smlp.progress import Progress


def test_a_log_file_gets_a_line_every_so_often(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 100, 4))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with Progress(3) as shown:
        for number in range(1, 4):
            shown.show(number, f"{number} of 3")
    assert capsys.readouterr().err == "3 of 3\n"


def test_tensors_are_counted_when_the_next_one_is_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    specs = dict.fromkeys("ab", Spec((10**9,), torch.uint8))
    passed = tensors_of(SimpleNamespace(specs=specs, read=str.upper))
    assert next(passed) == ("a", "A")
    assert capsys.readouterr().err == ""
    assert list(passed) == [("b", "B")]
    assert capsys.readouterr().err == "1.0 of 2.0 GB written\n2.0 of 2.0 GB written\n"


@pytest.mark.parametrize(("total", "said"), [(4, "50%"), (None, "2 done")])
def test_a_terminal_gets_a_bar(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    total: int | None,
    said: str,
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "160")
    with Progress(total) as shown:
        shown.show(2, "2 done")
    printed = capsys.readouterr().err
    assert said in printed
    assert "2 done" in printed
