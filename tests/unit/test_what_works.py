"""docs/what-works.md agrees with the checks of the flags."""

import functools
import importlib

import pytest
from support.in_process import prepare_megatron
from support.launches import REPOSITORY

from megatron_smlp.flags import parse


def test_the_page_is_what_the_checks_say(monkeypatch: pytest.MonkeyPatch):
    prepare_megatron()
    monkeypatch.syspath_prepend(REPOSITORY / "docs")
    module = importlib.import_module("what_works")
    for place, name in ((module, "read_yaml"), (module, "build_parser"), (parse, "build_parser")):
        monkeypatch.setattr(place, name, functools.cache(getattr(place, name)))  # 300 command lines
    text = module.PAGE.read_text(encoding="utf-8")
    assert text == module.page(), "PYTHONPATH=tests python docs/what_works.py"
