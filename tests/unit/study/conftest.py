"""A study with simulated runs, for the tests of its report."""

from pathlib import Path

import pytest
from support.studies import state_of, write_study

from megatron_smlp.study.figures import Drawing
from megatron_smlp.study.state import State


@pytest.fixture
def known(tmp_path: Path) -> State:
    tuning = {"seed": 1, "horizon": "50K", "lr": [0.5, 1, 2]}
    return state_of(write_study(tmp_path, tuning=tuning), runs=tmp_path / "runs")


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip a report's figures, which take seconds and which other tests cover."""
    monkeypatch.setattr(Drawing, "figures", lambda *_: iter(()))
