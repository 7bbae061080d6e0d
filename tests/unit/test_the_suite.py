"""The suite's own parts: tables with every kind of system in them, and the canary's command."""

import re
from pathlib import Path

import pytest
from support.launches import REPOSITORY, run_command

from megatron_smlp.systems import ARCHITECTURES, TOKEN_ROUTERS

MATRICES = {
    "architecture": (
        *("invariants/test_layouts.py", "invariants/test_resume.py"),
        *("invariants/test_resharding.py", "support/smlp_systems.py"),
        *("unit/routers/test_twins.py", "unit/test_footprint.py"),
    ),
    "token_router": (
        *("invariants/test_layouts.py", "unit/routers/test_twins.py"),
        "support/smlp_systems.py",
    ),
}
"""Files with a table of systems, in which every kind has to be."""


def test_the_canary_takes_sources_of_megatron(tmp_path: Path):
    sources = tmp_path / "megatron" / "core" / "datasets"
    sources.mkdir(parents=True)
    (sources / "helpers.cpp").touch()
    command = ["make", "-n", "canary"]
    done = run_command(command, code=2)
    assert "MEGATRON=DIR must name sources of Megatron-LM" in done.stderr.splitlines()[-1]
    said = run_command([*command, f"MEGATRON={tmp_path}"]).stdout
    assert f"{sources}/helpers.cpp -o {sources}/helpers_cpp" in said
    tests = said.partition(f"PYTHONPATH={tmp_path} OMP_NUM_THREADS=1")[2].split()
    named = {word for word in tests if word.startswith("tests/")}
    assert named == {"tests/contract", "tests/golden", "tests/invariants/test_layouts.py"}
    assert all((REPOSITORY / name).exists() for name in named)


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
