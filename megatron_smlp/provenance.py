"""The software of a run: the commit of this repository, where it is one, and package versions."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("megatron-core", "torch", "numpy", "transformers", "tokenizers", "safetensors")


@cache
def software() -> dict[str, Any]:
    """`commit` (None for an installed package), `python` and `packages` with their versions."""
    return {"commit": _commit(), "python": platform.python_version(), "packages": versions()}


def versions() -> dict[str, str | None]:
    """Return those of this package and of the packages that it stands on."""
    return {name: version_of(name) for name in ("megatron-smlp", *PACKAGES)}


def version_of(package: str) -> str | None:
    """Return the version that the installation records; some packages would ask git in the current
    folder."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Twelve digits, and `-dirty` where files differ from it."""
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
