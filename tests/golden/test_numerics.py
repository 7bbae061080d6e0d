"""The nine systems train to known losses: results of a study count only while these hold.

Compares losses and gradient norms of a few fp32 steps in one process. Processors' rounding differs
by less than the tolerance, a changed formula, draw, sample order or default by more. For an
intended change:

    PYTHONPATH=tests:. python tests/golden/test_numerics.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from support.launches import launch, steps
from support.systems import MODEL, SYSTEMS

FILE = Path(__file__).with_name("losses.json")
STEPS = 4
FLAGS = f"""{MODEL} --seq-length 32 --global-batch-size 4 --train-iters {STEPS} --seed 7
    --weight-decay 0.1 --clip-grad 1 --lr-warmup-iters 1 --lr-decay-style WSD
    --lr-wsd-decay-iters 2 --lr-wsd-decay-style minus_sqrt"""

Numbers = dict[str, list[list[float]]]


def trained(folder: Path) -> Numbers:
    """Return loss and gradient norm of every step of every system."""
    runs = {name: f"{flags} {FLAGS}" for name, flags in SYSTEMS.items()}
    launch(runs, processes=1, folder=folder)
    return {
        name: [[step.loss, step.grad_norm] for step in steps(folder / name)] for name in SYSTEMS
    }


def test_the_systems_train_to_what_they_did(tmp_path: Path):
    known = json.loads(FILE.read_text(encoding="utf-8"))
    advice = "the numerics of training changed: see the top of this file"
    found = trained(tmp_path)
    for name, numbers in known["losses"].items():
        assert len(found[name]) == STEPS
        for one, other in zip(found[name], numbers, strict=True):
            assert one == pytest.approx(other, rel=1e-4), f"{name}: {advice}"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        lines = [f'  "{name}": {numbers}' for name, numbers in trained(Path(folder)).items()]
    text = ",\n".join(lines)
    FILE.write_text(f'{{\n "losses": {{\n{text}\n }}\n}}\n', encoding="utf-8")
