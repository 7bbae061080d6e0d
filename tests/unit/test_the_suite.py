"""The suite's own tables of systems have every architecture and token router in them."""

import re

import pytest
from support.launches import REPOSITORY

from megatron_smlp.systems import ARCHITECTURES, TOKEN_ROUTERS

MATRICES = {
    "architecture": (
        *("invariants/test_layouts.py", "invariants/test_resume.py"),
        *("invariants/test_resharding.py", "support/smlp_systems.py"),
        *("unit/routers/test_same_as_hf.py", "unit/test_footprint.py"),
    ),
    "token_router": (
        *("invariants/test_layouts.py", "unit/routers/test_same_as_hf.py"),
        "support/smlp_systems.py",
    ),
}
"""Files whose table of systems must have every kind in it."""


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
