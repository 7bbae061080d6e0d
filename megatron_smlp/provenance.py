"""The software of a run: its sources, the commit if this is a repository, and package versions."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_smlp import plugin_texts

PACKAGES = ("megatron-core", "torch", "numpy", "transformers", "tokenizers", "safetensors")
HASH_DIGITS = 12
NOT_OF_A_STEP = {"commands.py", "conversion", "generation", "plotting", "serving", "study"}
"""Parts of the package that do not affect a step: they read, compare or serve what was trained."""


@cache
def software() -> dict[str, Any]:
    """Return `commit` (None for an installed package), `sources`, and the versions of `python` and
    `packages`."""
    return made_by() | {"python": platform.python_version(), "packages": versions()}


def made_by(
    plugins: Sequence[tuple[str, str]] | None = None,
    package: tuple[str | None, Any] | None = None,
) -> dict[str, str | None]:
    """Return the commit, and a hash of the sources, of the code that a process trains with.

    Args:
        plugins: name and text of each; default: those that this process has loaded.
        package: an earlier answer of `package_now`; default: the present one.
    """
    commit, digest = package or package_now()
    digest = digest.copy()
    for plugin, content in plugin_texts.texts().items() if plugins is None else plugins:
        digest.update(f"{plugin}\n{len(content.encode())}\n{content}".encode())
    return {"commit": commit, "sources": digest.hexdigest()[:HASH_DIGITS]}


def sources() -> str:
    """Return a hash of the texts that determine what a step of this process computes."""
    return str(made_by()["sources"])


def package_now() -> tuple[str | None, Any]:
    """Return the commit, and a hashlib object fed with what a step depends on: pretrain_smlp.py and
    the package except NOT_OF_A_STEP."""
    package = Path(__file__).parent
    files = [package.with_name("pretrain_smlp.py"), *sorted(package.rglob("*.py"))]
    digest = hashlib.sha256()
    for file in files:
        name = file.relative_to(package.parent)
        if not NOT_OF_A_STEP.intersection(name.parts[1:2]):
            digest.update(f"{name}\n{len(text := file.read_bytes())}\n".encode() + text)
    return _commit(), digest


def versions() -> dict[str, str | None]:
    """Return the versions of this package and of the packages it builds on."""
    return {name: version_of(name) for name in ("megatron-smlp", *PACKAGES)}


def version_of(package: str) -> str | None:
    """Return the version recorded at installation; some packages' own version would come from git
    in the current folder."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return twelve digits of the commit, plus `-dirty` if files differ from it."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    describe = "describe --always --dirty --abbrev=12 --exclude=*"
    command = ["git", "-C", str(root), *describe.split()]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
