"""YAML files of flags: `--config FILE.yaml`. No torch, no Megatron.

A flat mapping, hyphens or underscores. `include: FILE` takes the keys of another file, named from
the folder of this one; the keys of this one win.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from megatron_smlp.errors import UsageError

INCLUDE = "include"


def read_yaml(path: Path, *, including: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The keys as they are spelt, with those of included files first.

    Raises:
        UsageError: a file is missing, is no flat mapping, or includes itself.
    """
    if path.resolve() in including:
        raise UsageError(f"--config {path} includes itself: remove its `include:` line.")
    keys = _mapping(path)
    name = keys.pop(INCLUDE, None)
    if name is None:
        return keys
    if not isinstance(name, str):
        raise UsageError(f"--config {path}: 'include' names one file, not {name!r}.")
    included = read_yaml(path.parent / name, including=(*including, path.resolve()))
    own = {spelling(key) for key in keys}
    return {key: value for key, value in included.items() if spelling(key) not in own} | keys


def spelling(key: str) -> str:
    """The name in Megatron's namespace."""
    return key.replace("-", "_")


def _mapping(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"--config {path}: no such file; configs/ holds ready ones.") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"--config {path} cannot be read as YAML: {reason}") from error
    if not isinstance(content, dict):
        raise UsageError(f"--config {path} must hold `flag: value` lines at its top level.")
    return {str(key): value for key, value in content.items()}
