"""The files that `--input` names, and what the manifest and a resumed run know of them."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_smlp.data.pairs.manifest import is_manifest
from megatron_smlp.data.prepare.compression import compression_of
from megatron_smlp.errors import DataError

PARQUET_MAGIC = b"PAR1"
KNOWN_SUFFIXES = tuple(
    text + packed
    for text in (".jsonl", ".json", ".ndjson")
    for packed in ("", ".gz", ".zst", ".bz2", ".xz")
)


def find_inputs(patterns: Sequence[str]) -> list[Path]:
    """Return the files of paths, globs and folders (searched recursively), sorted within each.

    `-` is the standard input.

    Raises:
        DataError: a pattern names nothing, or a folder holds no known format.
    """
    found: list[Path] = []
    for pattern in patterns:
        path = Path("/dev/stdin" if pattern == "-" else pattern)
        if path.is_dir():
            found += _files_in(path)
        elif path.exists():
            found.append(path)
        else:
            # `Path.glob` takes no absolute pattern.
            matches = sorted(map(Path, glob.glob(pattern, recursive=True)))  # noqa: PTH207
            if not matches:
                raise DataError(f"--input {pattern}: no such file, folder or match")
            for match in matches:
                found += _files_in(match) if match.is_dir() else [match]
    return found


def _files_in(folder: Path) -> list[Path]:
    suffixes = (*KNOWN_SUFFIXES, ".parquet")
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.name.endswith(suffixes) and path.is_file() and not _is_output(path)
    )
    if not files:
        raise DataError(f"--input {folder}: the folder holds no {', '.join(suffixes)} file")
    return files


def _is_output(path: Path) -> bool:
    """Return True for hidden files and for what these tools write, perhaps beside the corpus."""
    if path.name.startswith(".") or path.name.endswith(".rejected.jsonl"):
        return True
    return path.parent.suffix == ".partial" or (path.suffix == ".json" and is_manifest(path))


def is_parquet(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return path.suffix == ".parquet" or stream.read(4) == PARQUET_MAGIC


def describe_inputs(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Return name, size in bytes and compression of each file, for the manifest."""
    return [
        {"file": shown(path), "bytes": path.stat().st_size, "compression": compression_of(path)}
        for path in files
    ]


def shown(path: Path) -> str:
    """Return its name as text, even where a byte of it is not part of a character."""
    return os.fsencode(path).decode("utf-8", errors="backslashreplace")


def stamps_of(files: Sequence[Path]) -> list[tuple[int, int] | None]:
    """Return size and time of change of each file; None for what is not a file, or is gone."""
    stats = [path.stat() if path.is_file() else None for path in files]
    return [stat and (stat.st_size, stat.st_mtime_ns) for stat in stats]


def comparable_size(patterns: Sequence[str]) -> int | None:
    """Return the bytes of text in the input where they are known: plain text files only."""
    files = find_inputs(patterns)
    if any(is_parquet(path) or compression_of(path) for path in files):
        return None
    return sum(path.stat().st_size for path in files)
