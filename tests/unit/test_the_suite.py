"""The suite's own parts: errors of runs come out, GPUs are seen where they are meant."""

import re
import sys

import pytest
from support.launches import REPOSITORY
from support.runs import ending_well
from support.selection import looks_at_gpus

from megatron_smlp.systems import ARCHITECTURES, TOKEN_ROUTERS

MATRICES = {
    "architecture": (
        *("invariants/test_layouts.py", "invariants/test_resume.py"),
        *("invariants/test_resharding.py", "support/smlp_systems.py"),
        *("unit/routers/test_twins.py", "unit/test_accounting.py", "unit/test_footprint.py"),
    ),
    "token_router": (
        *("invariants/test_layouts.py", "unit/routers/test_twins.py"),
        *("support/smlp_systems.py", "unit/test_accounting.py"),
    ),
}
"""Files with a table of systems, in which every kind has to be."""


@pytest.mark.parametrize("expression", ["gpu", "gpu and not slow", "gpu or slow"])
def test_gpus_are_seen(expression: str):
    assert looks_at_gpus(expression)


@pytest.mark.parametrize("expression", ["", "not gpu", "not slow", "slow", "slow or not gpu"])
def test_gpus_are_hidden(expression: str):
    assert not looks_at_gpus(expression)


@pytest.mark.parametrize("code", [1, "a line that says why"])
def test_a_run_that_exits_with_an_error_is_not_hidden(code: object):
    """Megatron ends so where it cannot compile its helper, as an example."""
    with pytest.raises(SystemExit) as ended, ending_well():
        sys.exit(code)
    assert ended.value.code == code


@pytest.mark.parametrize("code", [None, 0])
def test_a_run_that_exits_as_asked_has_ended(code: object):
    with ending_well():
        sys.exit(code)


@pytest.mark.parametrize(
    ("file", "option"), [(file, option) for option, files in MATRICES.items() for file in files]
)
def test_every_kind_is_in_the_tables_of_the_tests(file: str, option: str):
    text = (REPOSITORY / "tests" / file).read_text(encoding="utf-8")
    kinds = {"architecture": ARCHITECTURES, "token_router": TOKEN_ROUTERS}[option]
    flag = "--" + option.replace("_", "-")
    missing = [
        name for name in kinds if not re.search(rf'{flag} {name}\b|"{option}": "{name}"', text)
    ]
    assert not missing, f"tests/{file}: its table of systems lacks {flag} {', '.join(missing)}"
