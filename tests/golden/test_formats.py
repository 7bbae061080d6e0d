"""This release reads what earlier ones wrote: data, checkpoints to resume, exports."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import formats
from support.in_process import pretrained
from support.launches import steps

WRITTEN = sorted(formats.HERE.glob("written_by_*"))


@pytest.fixture(params=WRITTEN, ids=[path.name for path in WRITTEN])
def written(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return shutil.copytree(request.param, tmp_path / "written")


def expected(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "expected.json").read_text(encoding="utf-8"))


def test_this_release_has_its_files():
    assert formats.WRITTEN in WRITTEN


def test_a_run_goes_on(written: Path, monkeypatch: pytest.MonkeyPatch):
    """It resumes weights, optimizer, schedule, BASE's prices, data position and data checks."""
    monkeypatch.chdir(written)
    with pretrained(formats.training(iterations=4), base=""):
        losses = [step.loss for step in steps(written / "log")]
    assert losses == pytest.approx(expected(written)["resumed"], rel=1e-3)


def test_a_dataset_is_whole(written: Path):
    formats.run("tools/inspect_dataset.py", "validate pair_text_document", folder=written)


def test_an_export_is_loaded(written: Path):
    logits = formats.logits(written / "exported")[:8]
    torch.testing.assert_close(
        logits, torch.tensor(expected(written)["logits"]), rtol=1e-3, atol=1e-4
    )
