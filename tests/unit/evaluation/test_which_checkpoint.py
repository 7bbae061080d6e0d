"""evaluate.py scores the folder that is named, or says why it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_smlp.checkpoints.folders import RELEASE, TRACKER, iteration_folder
from megatron_smlp.errors import UsageError
from megatron_smlp.evaluation.megatron_loading import _load_flags


def test_the_folder_that_is_named_is_loaded(tmp_path: Path) -> None:
    """Not what the tracker of an imported model names, that was trained on in its folder."""
    folder, release = iteration_folder(tmp_path, 100), tmp_path / RELEASE
    for path in (folder, release):
        path.mkdir()
    (tmp_path / "best").symlink_to(folder)
    (tmp_path / TRACKER).write_text("100")
    run = str(tmp_path)
    for path in (folder, tmp_path / "best"):
        assert _load_flags(path) == ["--load", run, "--ckpt-step", "100"]
    with pytest.raises(UsageError, match=r"release is read by .*convert_checkpoint\.py"):
        _load_flags(release)
    (tmp_path / TRACKER).write_text(RELEASE)
    assert _load_flags(release) == ["--load", run]
    with pytest.raises(UsageError, match="they name another folder"):
        _load_flags(folder)
