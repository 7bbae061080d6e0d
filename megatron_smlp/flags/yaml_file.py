"""Read YAML files of flags; config_file.py turns them into flags. No torch, no Megatron.

A file is a flat mapping, keys with hyphens or underscores, of numbers, strings and lists of them.
`include: FILE`, or a list of files, adds the keys of others, by paths relative to this file. Later
files override earlier ones, and this file overrides all, even other keys that its own exclude.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterable, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from megatron_smlp.errors import UsageError
from megatron_smlp.flags.exclusive import replaced_by

CONFIG, INCLUDE = "--config", "include"
SCALARS = (str, int, float, bool, type(None))


def config_paths(argv: Sequence[str]) -> list[Path]:
    """Return the path of each `--config FILE` on a command line."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(CONFIG, action="append", nargs="?", type=Path, default=[])
    return [path for path in parser.parse_known_args(list(argv))[0].config if path]


class Setting(NamedTuple):
    """A key's value, and the FILE:LINE that sets it."""

    value: Any
    place: str


def read_yaml(*paths: Path) -> dict[str, Any]:
    """Return the keys of files, spelled as there, with those of included files first.

    Raises:
        UsageError: a file is missing, is not a flat mapping, or includes itself.
    """
    return {key: setting.value for key, setting in read_settings(paths).items()}


def read_settings(paths: Iterable[Path]) -> dict[str, Setting]:
    """Return the keys of files as `read_yaml` does, with the place of each value."""
    files: dict[Path, dict[str, Setting]] = {}
    return reduce(_under, (_read(path, (), files) for path in paths), {})


def _shipped(path: Path) -> Path:
    """Return the path itself or, if no file is there, the installed preset of this name, such as
    configs/cpu/gmlp.yaml or plugins/aft.yaml."""
    if path.exists() or path.parts[0] not in ("configs", "plugins"):
        return path
    packages = Path(__file__).parents[2]
    # A wheel's, or a checkout's.
    presets = (folder / path for folder in (packages / "megatron_smlp_presets", packages))
    return next((preset for preset in presets if preset.exists()), path)


def _read(
    path: Path, including: tuple[Path, ...], files: dict[Path, dict[str, Setting]]
) -> dict[str, Setting]:
    """Read one file, or take it from the cache `files`: it may be included many times."""
    path = _shipped(path)
    if path.resolve() in [file.resolve() for file in including]:
        chain = " includes ".join(str(file) for file in (*including, path))
        raise UsageError(f"--config {path} includes itself: {chain}. Remove an `include:` line.")
    if path.resolve() not in files:
        keys = _mapping(path)
        names = keys.pop(INCLUDE, Setting([], "")).value
        names = names if isinstance(names, list) else [names]
        if not all(isinstance(name, str) for name in names):
            raise UsageError(f"--config {path}: 'include' takes a file, or a list [a, b].")
        others = [Path(os.path.normpath(path.parent / name)) for name in names]
        included = [_read(other, (*including, path), files) for other in others]
        files[path.resolve()] = reduce(_under, [*included, keys], {})
    return files[path.resolve()]


def _under(below: dict[str, Setting], above: dict[str, Setting]) -> dict[str, Setting]:
    """Merge both, dropping the keys of `below` that those of `above` override or replace."""
    own = {spelling(key) for key in above}
    own |= replaced_by(
        spelling(key)
        for key, (value, _) in above.items()
        if value is not None and value is not False
    )
    return {key: setting for key, setting in below.items() if spelling(key) not in own} | above


def spelling(key: str) -> str:
    """Return a key's name in Megatron's namespace."""
    return key.replace("-", "_")


class StrictLoader(yaml.SafeLoader):
    """A safe loader that refuses what would silently go wrong: duplicate keys, of which YAML keeps
    the last, and merges, which may grow without bound."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = spelling(str(key.value))
            if name in seen or key.tag == "tag:yaml.org,2002:merge":
                what = "appears twice" if name in seen else "merges: write the keys out"
                raise yaml.constructor.ConstructorError(
                    problem=f"{name!r:.60} {what}", problem_mark=key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep=deep)


# YAML 1.1, which PyYAML implements, requires a dot and a sign: 1e-3 would be a string.
StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _mapping(path: Path) -> dict[str, Setting]:
    content, node = _parsed(path, name=f"--config {path}", ready="configs/")
    if not isinstance(content, dict):
        raise UsageError(f"--config {path} must hold `flag: value` lines at its top level.")
    for key, value in content.items():
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, SCALARS) for item in items):
            raise UsageError(
                f"--config {path}: '{str(key)[:60]}' is not a number, string, switch or list of "
                "these; quote dates."
            )
    assert isinstance(node, yaml.MappingNode)
    lines = (key.start_mark.line + 1 for key, _ in node.value)
    return {
        str(key): Setting(value, f"{path}:{line}")
        for (key, value), line in zip(content.items(), lines, strict=True)
    }


def load_strictly(path: Path, *, name: str, ready: str) -> Any:
    """Return the content of a file, read with StrictLoader.

    Args:
        name: what messages call the file.
        ready: the folder of ready-made files of its kind, for messages.

    Raises:
        UsageError: it cannot be read.
    """
    return _parsed(path, name=name, ready=ready)[0]


def _parsed(path: Path, *, name: str, ready: str) -> tuple[Any, yaml.Node | None]:
    """Return the content of a file and the YAML node it was built from, which has line numbers."""
    try:
        loader = StrictLoader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        return (None if node is None else loader.construct_document(node)), node
    except FileNotFoundError as error:
        raise UsageError(f"{name}: no such file; see {ready}.") from error
    except IsADirectoryError as error:
        raise UsageError(f"{name} is a folder: give a file in it.") from error
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"{name} cannot be read as YAML: {reason}") from error
