"""The wording of refusals is pinned only here."""

from golden.refusals import GOLDEN, listed


def test_what_is_refused_reads_as_listed():
    assert listed() == GOLDEN.read_text(encoding="utf-8"), "python tests/golden/refusals.py"
