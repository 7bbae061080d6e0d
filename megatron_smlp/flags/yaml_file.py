"""Read YAML files of flags; config_file.py makes flags of one. No torch, no Megatron.

A flat mapping, hyphens or underscores, of numbers, texts and lists of them. `include: FILE` takes
the keys of another file, named from the folder of this one; the keys of this one win, also over
those that they exclude.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from megatron_smlp.errors import UsageError
from megatron_smlp.flags.exclusive import replaced_by

INCLUDE = "include"
MOST_INCLUDES = 20
MOST_BYTES = 1 << 20
SCALARS = (str, int, float, bool, type(None))


def read_yaml(path: Path, *, including: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the keys as they are spelt, with those of included files first.

    Raises:
        UsageError: a file is missing, is not a flat mapping, or includes itself.
    """
    if path.resolve() in including:
        raise UsageError(f"--config {path} includes itself: remove its `include:` line.")
    if len(including) > MOST_INCLUDES:
        raise UsageError(f"--config {including[0]} includes more than {MOST_INCLUDES} files deep.")
    keys = _mapping(path)
    name = keys.pop(INCLUDE, None)
    if name is None:
        return keys
    if not isinstance(name, str):
        raise UsageError(f"--config {path}: 'include' names one file.")
    included = read_yaml(path.parent / name, including=(*including, path.resolve()))
    own = {spelling(key) for key in keys}
    is_given = {key: value is not None and value is not False for key, value in keys.items()}
    own |= replaced_by(spelling(key) for key in keys if is_given[key])
    return {key: value for key, value in included.items() if spelling(key) not in own} | keys


def spelling(key: str) -> str:
    """Return the name in Megatron's namespace."""
    return key.replace("-", "_")


class StrictLoader(yaml.SafeLoader):
    """A safe loader without what goes wrong in silence: a key that is there twice, of which YAML
    keeps the last, and merges, which may grow without bound."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = spelling(str(key.value))
            if name in seen or key.tag == "tag:yaml.org,2002:merge":
                what = "is there twice" if name in seen else "merges: give the keys themselves"
                raise yaml.constructor.ConstructorError(
                    problem=f"{name!r:.60} {what}", problem_mark=key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep=deep)


def _mapping(path: Path) -> dict[str, Any]:
    content = load_strictly(path, name=f"--config {path}", ready="configs/")
    if not isinstance(content, dict):
        raise UsageError(f"--config {path} must hold `flag: value` lines at its top level.")
    for key, value in content.items():
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, SCALARS) for item in items):
            raise UsageError(
                f"--config {path}: '{str(key)[:60]}' is not a number, text, switch or list of "
                "them; put a date between quotes."
            )
    return {str(key): value for key, value in content.items()}


def load_strictly(path: Path, *, name: str, ready: str) -> Any:
    """Return what a file holds, by StrictLoader.

    Args:
        name: of the file, in a message.
        ready: where files of its kind are.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        return yaml.load(_text_of(path), StrictLoader)
    except FileNotFoundError as error:
        raise UsageError(f"{name}: no such file; {ready} holds ready ones.") from error
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"{name} cannot be read as YAML: {reason}") from error


def _text_of(path: Path) -> str:
    """Return a regular file's text: a device has no end, and a pipe may have no writer."""
    if path.exists() and not path.is_file():
        raise ValueError("it is not a regular file")
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES} bytes")
    return content.decode("utf-8")
