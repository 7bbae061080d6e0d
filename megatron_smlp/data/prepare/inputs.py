"""Find the files that `--input` names, and describe them for the manifest and a resumed run."""

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_smlp.data.pairs.manifest import is_manifest
from megatron_smlp.data.prepare.compression import COMPRESSIONS
from megatron_smlp.errors import DataError

SUFFIXES = (
    *(f".{text}{packed}" for text in ("jsonl", "json", "ndjson") for packed in ("", *COMPRESSIONS)),
    ".parquet",
)


def find_inputs(patterns: Sequence[str]) -> list[Path]:
    """Return the files of paths, globs and folders (searched recursively), sorted within each.

    `-` is standard input. A file that is named again, perhaps through a link, is left out.

    Raises:
        DataError: a pattern names nothing, or a folder holds no known format.
    """
    files: dict[Path, Path] = {}
    for pattern in patterns:
        path = Path("/dev/stdin" if pattern == "-" else pattern)
        matches = [path] if path.exists() else _unwritten(pattern)
        if not matches:
            raise DataError(f"--input {pattern}: no such file, folder or match")
        for match in matches:
            for file in _files_in(match) if match.is_dir() else [match]:
                files.setdefault(file.resolve(), file)
    return list(files.values())


def _files_in(folder: Path) -> list[Path]:
    every = _unwritten(f"{glob.escape(str(folder))}/**")
    files = [path for path in every if path.name.endswith(SUFFIXES) and path.is_file()]
    if not files:
        raise DataError(f"--input {folder}: the folder holds no {', '.join(SUFFIXES)} file")
    return files


def _unwritten(pattern: str) -> list[Path]:
    """Return what matches, sorted, without hidden files and output of these tools, which may be
    next to the corpus."""
    # `Path.glob` takes no absolute pattern.
    every = sorted(map(Path, glob.glob(pattern, recursive=True)))  # noqa: PTH207
    return [path for path in every if not _is_output(path)]


def _is_output(path: Path) -> bool:
    if path.name.endswith(".rejected.jsonl"):
        return True
    is_unfinished = any(part.endswith(".partial") for part in path.parts)
    return is_unfinished or (path.suffix == ".json" and path.is_file() and is_manifest(path))


def describe_inputs(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Return name, size in bytes and compression of each file, for the manifest."""
    return [
        {
            "file": str(path),
            "bytes": path.stat().st_size,
            "compression": COMPRESSIONS.get(path.suffix),
        }
        for path in files
    ]


def stamps_of(files: Sequence[Path]) -> dict[Path, tuple[int, int] | None]:
    """Return size and modification time of each file; None for a pipe, which cannot be resumed."""
    stats = {path: path.stat() if path.is_file() else None for path in files}
    return {path: stat and (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


def comparable_size(files: Sequence[Path]) -> int | None:
    """Return the bytes of text in the input; None unless all files are uncompressed text."""
    if any(path.suffix in (*COMPRESSIONS, ".parquet") for path in files):
        return None
    return sum(path.stat().st_size for path in files)
