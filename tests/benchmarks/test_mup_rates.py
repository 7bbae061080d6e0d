"""benchmarks/mup.py: which trials are trained, and which rate is the best."""

import sys
from pathlib import Path
from typing import Any

import mup
import pytest


def test_the_best_rate_is_a_parabolas():
    curve = [(2.0**x, (x - 1.3) ** 2) for x in (-2, 0, 1, 2, 3)]
    assert mup.best(curve) == pytest.approx(2**1.3)
    assert mup.best(curve[:2]) == 1, "the edge, where nothing is beyond"


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
