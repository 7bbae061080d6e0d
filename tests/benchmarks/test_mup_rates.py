"""benchmarks/mup.py: which trials are trained, and which rate is the best."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mup
import pytest


def test_the_best_rate_is_a_parabolas():
    curve = [(2.0**x, (x - 1.3) ** 2) for x in (-2, 0, 1, 2, 3)]
    assert mup.best(curve) == pytest.approx(2**1.3)
    assert mup.best(curve[:2]) == 1, "the edge, where nothing is beyond"


def test_trials_differ_in_what_is_compared(parse: Callable[..., Any]):
    scaled, plain = (parse(mup.flags((uses_mup, 128, 0.004)), base=BASE) for uses_mup in (1, 0))
    assert (scaled.use_mup, scaled.mup_base_hidden_size, scaled.mup_base_head_dim) == (True, 64, 32)
    assert (scaled.hidden_size, scaled.num_attention_heads, scaled.lr) == (128, 4, 0.004)
    names = {name for name in vars(plain) if getattr(plain, name) != getattr(scaled, name)}
    assert names - GIVEN == {"use_mup", "mup_base_hidden_size", "mup_base_head_dim"}


GIVEN = {"command_line", "explicit_flags", "places"}
BASE = "--mock-data --tokenizer-type NullTokenizer --vocab-size 100"


def test_rows_that_are_there_are_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trained = []

    def loss_of(trial: Any, data: str) -> float:
        assert f"{tmp_path}/train_text_document" in data
        trained.append(trial)
        return 5 + abs(trial[2] - 0.008) * trial[1]

    monkeypatch.setattr(mup, "loss_of", loss_of)
    rows, figure = tmp_path / "rows.csv", tmp_path / "figure.png"
    own = ["--data", str(tmp_path), "--csv", str(rows), "--figure", str(figure)]
    monkeypatch.setattr(sys, "argv", ["mup.py", *own])
    mup.main()
    assert len(trained) == len(set(trained)) == 30
    assert figure.stat().st_size > 10_000
    kept = [line for line in rows.read_text().splitlines(keepends=True) if ",0.016," not in line]
    rows.write_text("".join(kept))
    mup.main()
    assert {rate for _, _, rate in trained[30:]} == {0.016}
    assert len(mup.read(rows)) == 30
