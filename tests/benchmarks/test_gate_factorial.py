"""What is looked at in a router is what it is said to be."""

import csv
import sys
from pathlib import Path

import gate_factorial
import pytest
import torch
from gate_factorial import EVERY, Looking
from support.in_process import MINIMAL, prepare_megatron
from support.routers import make_router
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


@pytest.mark.usefixtures("megatron")
def test_an_experts_row(tmp_path: Path):
    router = make_router("base", num_experts=2)
    looking = Looking("a run", tmp_path / "rows.csv")
    looking.iteration = EVERY
    router.register_forward_hook(looking.look)
    tokens = torch.tensor([[3.0, 0.0], [1.0, 0.0], [-9.0, -7.0], [-9.0, -5.0]], requires_grad=True)
    probs, _ = router(tokens[:, None])
    (probs * torch.tensor([[1.0, 0], [-3, 0], [0, 2], [0, 2]])).sum().div(4).backward()
    looking.write()
    looking.iteration += 1
    router(tokens[:, None])[0].sum().backward()
    assert not looking.rows, "only every so many steps"
    first, second = csv.DictReader((tmp_path / "rows.csv").open())
    assert (first["run"], first["tokens"], second["tokens"]) == ("a run", "2", "2")
    assert [float(row["closed"]) for row in (first, second)] == [0, 1]
    assert [float(row["pull"]) for row in (first, second)] == [-1, 2]
    assert [float(row["tug"]) for row in (first, second)] == [2, 2]
    assert [float(row["shift"]) for row in (first, second)] == [-3.5, -3]
    assert float(first["mean_norm"]) == pytest.approx((3.5**2 + 3**2) ** 0.5, rel=1e-3)
