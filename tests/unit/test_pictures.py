"""Pictures of docs/ are what the tables say."""

import importlib

import pytest
from support.launches import REPOSITORY

FOLDER = REPOSITORY / "docs" / "pictures"


def test_pictures_are_of_the_tables(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(FOLDER)
    drawn = importlib.import_module("draw").pictures()
    assert {path.name for path in FOLDER.glob("*.svg")} == set(drawn)
    for name, picture in drawn.items():
        text = (FOLDER / name).read_text(encoding="utf-8")
        assert text == picture, f"{name}: python docs/pictures/draw.py"


def test_the_readme_shows_what_the_quickstart_printed():
    printed = (FOLDER / "quickstart.txt").read_text(encoding="utf-8")
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    shown = readme.split("```text\n")[1].split("```")[0]
    assert shown in printed, "python docs/pictures/console.py"
