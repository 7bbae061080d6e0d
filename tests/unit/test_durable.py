"""Files and folders are replaced whole or not at all."""

import threading
from pathlib import Path

import pytest
from support.deletion import names_in

from megatron_smlp import durable
from megatron_smlp.durable import (
    link_durably,
    naming_errors,
    remove_folder,
    replace_folder,
    write_durably,
)


def _folder(path: Path, file: str) -> Path:
    path.mkdir()
    (path / file).touch()
    return path


def test_a_folder_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    target = _folder(tmp_path / "target", "old")
    replace_folder(_folder(tmp_path / "new", "new"), target)
    assert names_in(tmp_path) == ["target"]
    assert [path.name for path in target.iterdir()] == ["new"]


def test_two_writers_of_one_process_number_are_in_nobodys_way(tmp_path: Path) -> None:
    """Both may be process 1, in two containers that share the folder."""
    path = tmp_path / "file"
    write_durably(path, "late", before_rename=lambda: write_durably(path, "early"))
    assert path.read_text(encoding="utf-8") == "late"
    assert names_in(tmp_path) == ["file"]


def test_nobody_waits_for_a_large_folder_to_be_deleted(tmp_path: Path) -> None:
    may_go = threading.Event()
    durable._deleting.submit(may_go.wait, 20)  # like an earlier deletion that takes long
    _folder(tmp_path / "large", "file")
    remove_folder(tmp_path / "large")
    assert [path.name for path in tmp_path.iterdir()] == [".large.deleted"]
    may_go.set()
    assert not names_in(tmp_path)


def test_an_older_folder_stays_where_there_is_no_new_one(tmp_path: Path) -> None:
    target = _folder(tmp_path / "target", "old")
    with pytest.raises(FileNotFoundError):
        replace_folder(tmp_path / "new", target)
    assert [path.name for path in target.iterdir()] == ["old"]


@pytest.mark.parametrize("has_links", [True, False])
def test_a_file_takes_the_place_of_an_older_one(
    tmp_path: Path, has_links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise PermissionError

    if not has_links:
        monkeypatch.setattr(Path, "hardlink_to", refuse)
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_text("new")
    target.write_text("old")
    link_durably(source, target)
    assert target.read_text() == "new"
    expected = {"source", "target"} if has_links else {"target"}
    assert {path.name for path in tmp_path.iterdir()} == expected


def test_a_library_in_rust_says_what_the_system_said(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    path = tmp_path / "none" / "tokenizer.json"
    said = pytest.raises(FileNotFoundError, match="No such file or directory")
    with said as caught, naming_errors(path):
        Tokenizer(models.BPE()).save(str(path))
    assert caught.value.filename == str(path)
