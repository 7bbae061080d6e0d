"""The copying task: its samples, its models' sizes, and what a run of it writes."""

import json
import sys
from pathlib import Path

import copying
import pytest
import torch

pytestmark = pytest.mark.usefixtures("registry")


@pytest.mark.parametrize("system", copying.SYSTEMS)
def test_all_systems_have_the_transformers_parameters(system: str):
    wanted = copying.num_parameters(copying.equal_config("transformer", longest=16))
    ours = copying.num_parameters(copying.equal_config(system, longest=16))
    assert abs(ours / wanted - 1) < 0.02


def test_a_short_run_writes_figures_and_a_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    flags = f"copying.py --steps 60 --longest 2 --systems transformer --output {tmp_path}"
    monkeypatch.setattr(sys, "argv", flags.split())
    threads = torch.get_num_threads()
    copying.main()
    torch.set_num_threads(threads)
    result = json.loads((tmp_path / "copying.json").read_text())["transformer"]
    assert list(result["accuracy"]) == ["1", "2"]
    assert result["accuracy"]["1"] > 3 / copying.SYMBOLS  # it learns: chance is 1 / 16
    assert (tmp_path / "copying.png").read_bytes().startswith(b"\x89PNG")
