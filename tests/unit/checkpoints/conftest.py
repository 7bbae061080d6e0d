"""A run of three checkpoints, made once, and what a test does to a copy of it."""

import shutil
from pathlib import Path

import pytest
from support.checkpoints import pretrain


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A --save folder with iterations 2, 4 and 6; not to be written to."""
    folder: Path = tmp_path_factory.mktemp("finished") / "run"
    pretrain(f"--save {folder}")
    return folder


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "run"))
