"""megatron_patches/table.py: every row is in effect and has a test, and no row is missing."""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from contract.test_cpu_platform import replacements
from support.in_process import prepare_megatron
from support.launches import REPOSITORY

from megatron_smlp.megatron_patches.table import PATCHES, Patches

PATCHES_FOLDER = REPOSITORY / "megatron_smlp" / "megatron_patches"


def found(target: str) -> Any:
    """Return the object that Megatron or torch finds under this name."""
    names = target.split(".")
    for count in range(len(names) - 1, 0, -1):
        try:
            value: Any = importlib.import_module(".".join(names[:count]))
        except ModuleNotFoundError:
            continue
        for name in names[count:]:
            value = getattr(value, name)
        return value
    raise AssertionError(f"{target} is nowhere")


@pytest.mark.parametrize(
    ("patches", "target"), [(patches, target) for patches in PATCHES for target in patches.targets]
)
def test_a_row(patches: Patches, target: str):
    """Every replaced name exists, and is ours for the whole process."""
    prepare_megatron()
    value = found(target)
    if patches.extent == "process":
        # functools.wraps gives a wrapper its original's module, but not its code.
        assert "megatron_smlp" in value.__module__ + value.__code__.co_filename
    contract = REPOSITORY / "tests" / patches.contract
    name = target.rpartition(".")[2]
    assert re.search(rf"\b{name}\b", contract.read_text(encoding="utf-8")), "no test names it"


def attributes() -> Iterator[str]:
    for path in PATCHES_FOLDER.glob("*.py"):
        for target in replacements(Path(path).read_text(encoding="utf-8")):
            yield target.rpartition(".")[2]


def test_no_replacement_lacks_a_row():
    named = {target.rpartition(".")[2] for patches in PATCHES for target in patches.targets}
    assert {name for name in attributes() if name != "?"} <= named
