"""docs/what-works.md agrees with the checks of the flags."""

import importlib

import pytest
from support.in_process import prepare_megatron
from support.launches import REPOSITORY


def test_the_page_is_what_the_checks_say(monkeypatch: pytest.MonkeyPatch):
    prepare_megatron()
    monkeypatch.syspath_prepend(REPOSITORY / "docs")
    module = importlib.import_module("what_works")
    text = module.PAGE.read_text(encoding="utf-8")
    assert text == module.page(), "PYTHONPATH=tests python docs/what_works.py"
