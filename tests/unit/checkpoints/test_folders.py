"""Names in a run's folder: which are checkpoints, the order of loading, what is kept."""

import errno
import os
from contextlib import nullcontext
from pathlib import Path

import pytest
from support.deletion import names_in

from megatron_smlp.checkpoints import folders
from megatron_smlp.checkpoints.folders import MARKER, RUN, TRACKER, iteration_folder


def checkpoint(run: Path, iteration: int, *, whole: bool = True) -> Path:
    folder = iteration_folder(run, iteration)
    folder.mkdir(parents=True)
    (folder / RUN).write_text("{}")
    if whole:
        (folder / MARKER).write_text("")
    return folder


@pytest.mark.parametrize(
    ("tracker", "order"),
    [
        ("6", [6, 4, 2, 8]),  # what is later than the tracker says comes last
        ("8\n", [8, 6, 4, 2]),
        ("5", [4, 2, 8, 6]),
        ("", [8, 6, 4, 2]),
        ("\x00\x00", [8, 6, 4, 2]),
        (None, [8, 6, 4, 2]),
    ],
)
def test_order_of_loading(tmp_path: Path, tracker: str | None, order: list[int]):
    for iteration in (8, 2, 4, 6):
        checkpoint(tmp_path, iteration)
    (tmp_path / "iter_0000003").write_text("a file is no checkpoint")
    (tmp_path / ".iter_0000005.partial-00").mkdir()
    if tracker is not None:
        (tmp_path / TRACKER).write_text(tracker)
    assert folders.loading_order(tmp_path) == order


def test_the_latest_is_the_first_that_looks_whole(tmp_path: Path):
    assert folders.latest_iteration(tmp_path / "absent") is None
    assert folders.latest_iteration(tmp_path) is None
    checkpoint(tmp_path, 2, whole=False)
    assert folders.latest_iteration(tmp_path) == 2, "what is there is not passed over in silence"
    checkpoint(tmp_path, 0)
    checkpoint(tmp_path, 10_000_000)
    checkpoint(tmp_path, 10_000_002, whole=False)
    assert folders.latest_iteration(tmp_path) == 10_000_000
    (tmp_path / TRACKER).write_text("5")
    assert folders.latest_iteration(tmp_path) == 0


def test_tidying_finishes_what_was_interrupted(tmp_path: Path):
    """Interrupted between a replacement's two renames, after them, in a save, in a deletion."""
    checkpoint(tmp_path, 2).rename(tmp_path / ".iter_0000002.replaced")
    checkpoint(tmp_path, 4)
    (tmp_path / ".iter_0000004.replaced").mkdir()
    (tmp_path / ".iter_0000006.partial-0a1b").mkdir()
    (tmp_path / ".iter_0000001.deleted").mkdir()
    (tmp_path / ".of_the_user").mkdir()
    gone = folders.tidy(tmp_path)
    assert gone == [
        ".iter_0000001.deleted", ".iter_0000004.replaced", ".iter_0000006.partial-0a1b"
    ]  # fmt: skip
    assert set(names_in(tmp_path)) == {"iter_0000002", "iter_0000004", ".of_the_user"}
    assert folders.tidy(tmp_path / "absent") == []


class TestRetention:
    @pytest.mark.parametrize(
        ("last", "every", "newest", "gone"),
        [
            (None, None, 50, []),
            (2, None, 50, [10, 20, 30]),
            (1, None, 50, [10, 20, 30, 40]),
            (2, 20, 50, [10, 30]),
            (9, None, 50, []),
            (1, None, 30, [10, 20]),  # 40 and 50 are not this run's
        ],
    )
    def test_what_goes(
        self, tmp_path: Path, last: int | None, every: int | None, newest: int, gone: list[int]
    ):
        for iteration in (10, 20, 30, 40, 50):
            checkpoint(tmp_path, iteration)
        doomed = folders.superfluous(tmp_path, newest=newest, last=last, every=every)
        assert doomed == [iteration_folder(tmp_path, n) for n in gone]

    def test_incomplete_ones_and_links_neither_count_nor_go(self, tmp_path: Path):
        checkpoint(tmp_path, 20, whole=False)
        for iteration in (10, 30, 40):
            checkpoint(tmp_path, iteration)
        elsewhere = checkpoint(tmp_path / "elsewhere", 5)
        iteration_folder(tmp_path, 5).symlink_to(elsewhere)
        doomed = folders.superfluous(tmp_path, newest=40, last=2, every=None)
        assert doomed == [iteration_folder(tmp_path, 10)]


@pytest.mark.parametrize("code", [errno.ESTALE, errno.ENOENT])
def test_a_folder_that_cannot_be_listed_is_not_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
):
    """A run would start from scratch."""

    def fails(_: Path) -> None:
        raise OSError(code, os.strerror(code))

    folders.check_listing(tmp_path)
    monkeypatch.setattr(Path, "iterdir", fails)
    assert folders.iterations(tmp_path) == []  # a save that failed says what is left
    with pytest.raises(OSError, match="Stale") if code == errno.ESTALE else nullcontext():
        folders.check_listing(tmp_path)
