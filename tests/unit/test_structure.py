"""Which part of the package imports which, lazy imports included. See docs/architecture.md."""

from __future__ import annotations

import ast
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from support.launches import REPOSITORY

PACKAGE = REPOSITORY / "megatron_smlp"
# Bottom up: a part (a folder, or a file of the package itself) imports only what precedes it.
ORDER = (
    "errors",
    *("plugins", "plugin_texts", "signals", "unwritable_log", "program", "durable", "lease"),
    *("provenance", "restart_note", "library_logging", "command_line", "metrics_records"),
    "collectives",
    "first_rank",
    *("progress", "systems", "flag_facts", "partial_prediction", "options"),
    *("ops", "hf", "plugin_weights", "routers", "layers", "architectures"),
    *("platform", "data", "checkpoints", "megatron_patches", "flags", "plugin_files", "launching"),
    *("accounting", "model", "training", "conversion", "generation", "serving", "evaluation"),
    *("plotting", "study", "checking", "commands"),
)
# The order within data; training reads the last ones.
DATA_ORDER = ("tokenizers", "pairs", "prepare", "blending", "index_cache", "token_counts")
DATA_ORDER += ("datasets", "balanced_hash_table")
SELF_CONTAINED = ("ops", "hf", "plugin_weights", "routers", "layers")


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


@cache
def imports() -> dict[str, frozenset[str]]:
    """Module -> the package's modules that it imports, anywhere in its text.

    Strings `module:name` in systems.py and commands.py do not count: their readers import them.
    """
    files = {module_of(path): path for path in PACKAGE.rglob("*.py")}
    return {name: frozenset(_imported(path, files) - {name}) for name, path in files.items()}


def _imported(path: Path, files: dict[str, Path]) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        ours = (name.removeprefix("megatron_smlp.") for name in names if "megatron_smlp." in name)
        found |= {name for name in ours if name in files and name}
    return {name for name in found if files[name].name != "__init__.py"}


def part(module: str) -> str:
    return module.split(".")[0]


def test_every_part_has_its_place_in_the_order():
    assert {part(name) for name in imports() if name} == set(ORDER)


def test_no_part_imports_upward():
    height = {name: index for index, name in enumerate(ORDER)}
    within = {name: index for index, name in enumerate(DATA_ORDER)}

    def place(module: str) -> tuple[int, int]:
        folder, *rest = module.split(".")
        return height[folder], within[rest[0]] if folder == "data" and rest else 0

    upward = [
        f"{name} -> {other}"
        for name, others in imports().items()
        for other in sorted(others)
        if name and place(other) > place(name)
    ]
    assert upward == []


def test_files_form_no_circle():
    TopologicalSorter(imports()).prepare()  # else it raises an error that names the circle


@pytest.mark.parametrize("name", SELF_CONTAINED)
def test_the_model_half_imports_nothing_of_the_rest(name: str):
    others = {
        part(o) for module, all_of in imports().items() if part(module) == name for o in all_of
    }
    assert others <= {*SELF_CONTAINED, "plugins"}
    if name in ("hf", "ops"):
        assert others <= {name, "plugins"}


def test_folders_form_no_circle():
    """A node is the folder that a file lies in: a part's own files, or one of its subfolders."""
    folders: dict[str, set[str]] = {}
    for name, others in imports().items():
        own = name.rpartition(".")[0]
        between = {other.rpartition(".")[0] for other in others} - {own}
        folders.setdefault(own, set()).update(between)
    # The package's own files are at the bottom, and commands.py at the top.
    parts = {name: frozenset(others - {""}) for name, others in folders.items() if name}
    TopologicalSorter(parts).prepare()
