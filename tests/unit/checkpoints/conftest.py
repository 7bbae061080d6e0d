"""A run with three checkpoints, made once, and copies of it that tests may change."""

import shutil
from pathlib import Path

import pytest
from support.checkpoints import pretrain


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A --save folder with iterations 2, 4 and 6; read-only."""
    folder: Path = tmp_path_factory.mktemp("finished") / "run"
    pretrain(f"--save {folder}")
    return folder


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "run"))
