"""What is looked at in a router is what it is said to be."""

import csv
from pathlib import Path

import pytest
import torch
from gate_factorial import EVERY, Looking
from support.routers import make_router

pytestmark = pytest.mark.usefixtures("megatron")


def test_an_experts_row(tmp_path: Path):
    router = make_router("base", num_experts=2)
    looking = Looking(None, "a run", tmp_path / "rows.csv")
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
