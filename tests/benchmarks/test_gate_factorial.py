"""The rows that gate_factorial.py writes cover every logged step, layer and expert."""

import csv
import sys
from pathlib import Path

import gate_factorial
import pytest
import torch
from support.in_process import MINIMAL, prepare_megatron
from support.runs import forget_run


def test_rows_of_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gate_factorial, "RECIPE", MINIMAL)
    monkeypatch.setattr(gate_factorial, "ROOT", tmp_path)
    monkeypatch.setattr(gate_factorial, "EVERY", 2)
    rows = tmp_path / "rows.csv"
    own = ["--data", str(tmp_path), "--csv", str(rows), "--run", "small", "--"]
    model = "--architecture smlp --token-router base --num-experts 2 --num-dense-layers 2"
    monkeypatch.setattr(sys, "argv", ["gate_factorial.py", *own, *model.split()])
    prepare_megatron()
    try:
        gate_factorial.main()
    finally:
        forget_run()
        torch.distributed.destroy_process_group()
    found = {(row["iteration"], row["layer"], row["expert"]) for row in csv.DictReader(rows.open())}
    places = [(layer, expert) for layer in "34" for expert in "01"]
    assert found == {(step, *place) for step in "24" for place in places}
