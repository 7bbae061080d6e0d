"""Trainings match recorded ones of one machine: losses, gradient norms, names of what is recorded.

For a comparison to the last bit on one machine, see trainings.py, which made the file.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from golden.trainings import FILE, losses, recorded, train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
DENSE = ("transformer", "gmlp", "amlp", "mixer", "aft", "causal_rn")
EXACT, ROUNDED = (1e-4, 1e-3), (5e-3, 5e-2)
"""Relative tolerances of loss and gradient norm; half precision rounds differently elsewhere, and
a token between two experts may switch."""


def test_they_go_as_they_went(tmp_path: Path):
    known = json.loads(FILE.read_text(encoding="utf-8"))
    train(tmp_path)
    found = losses(recorded(tmp_path))
    assert set(found) == set(known)
    for name, run in known.items():
        tolerances = EXACT if name.removesuffix("_fp32") in DENSE else ROUNDED
        assert [s[0] for s in found[name]["steps"]] == [s[0] for s in run["steps"]], name
        for ours, theirs in zip(found[name]["steps"], run["steps"], strict=True):
            for one, other, rel in zip(ours[1:], theirs[1:], tolerances, strict=True):
                if isinstance(other, float):  # else none, or a text for what is not finite
                    assert one == pytest.approx(other, rel=rel), f"{name}, step {theirs[0]}"
        for what in ("fields", "curves", "saved"):
            assert found[name][what] == run[what], f"{name}: {what}"
