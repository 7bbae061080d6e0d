"""Find the files that `--input` names, and describe them for the manifest and a resumed run."""

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_smlp.data.pairs.manifest import is_manifest
from megatron_smlp.data.prepare.compression import compression_of
from megatron_smlp.errors import DataError

PARQUET_MAGIC = b"PAR1"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
KNOWN_SUFFIXES = tuple(
    text + packed
    for text in (".jsonl", ".json", ".ndjson")
    for packed in ("", ".gz", ".zst", ".bz2", ".xz")
)


def find_inputs(patterns: Sequence[str]) -> list[Path]:
    """Return the files of paths, globs and folders (searched recursively), sorted within each.

    `-` is standard input. A file that is named again, perhaps through a link, is left out.

    Raises:
        DataError: a pattern names nothing, or a folder holds no known format.
    """
    files: list[Path] = []
    for pattern in patterns:
        path = Path("/dev/stdin" if pattern == "-" else pattern)
        if path.is_dir():
            files += _files_in(path)
        elif path.exists():
            files.append(path)
        else:
            # `Path.glob` takes no absolute pattern.
            every = map(Path, glob.glob(pattern, recursive=True))  # noqa: PTH207
            matches = sorted(match for match in every if not _is_written(match))
            if not matches:
                raise DataError(f"--input {pattern}: no such file, folder or match")
            for match in matches:
                files += _files_in(match) if match.is_dir() else [match]
    first_names: dict[Path, Path] = {}
    for path in files:
        first_names.setdefault(path.resolve(), path)
    return list(first_names.values())


def _files_in(folder: Path) -> list[Path]:
    suffixes = (*KNOWN_SUFFIXES, ".parquet")
    files = sorted(
        path
        for path in _all_files(folder)
        if path.name.endswith(suffixes) and path.is_file() and not _is_output(path)
    )
    if not files:
        raise DataError(f"--input {folder}: the folder holds no {', '.join(suffixes)} file")
    return files


def _all_files(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder and its subfolders, following links, each folder once."""
    seen = set()
    for parent, folders, names in folder.walk(follow_symlinks=True):
        if (real := parent.resolve()) in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not _is_aside(name))
        yield from (parent / name for name in names)


def _is_aside(folder: str) -> bool:
    """Return True for hidden folders, such as those of downloads, and for unfinished output."""
    return folder.startswith(".") or folder.endswith(".partial")


def _is_written(match: Path) -> bool:
    """Return True if a glob's match is output of these tools, finished or not."""
    is_unfinished = any(part.endswith(".partial") for part in match.parts)
    return is_unfinished or (match.is_file() and _is_output(match))


def _is_output(path: Path) -> bool:
    """Return True for hidden files and for what these tools write, perhaps next to the corpus."""
    if path.name.startswith(".") or path.name in TOKENIZER_FILES:
        return True
    if path.name.endswith(".rejected.jsonl"):
        return True
    return path.suffix == ".json" and is_manifest(path)


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
    """Return the path as text, escaping bytes that are not valid UTF-8."""
    return os.fsencode(path).decode("utf-8", errors="backslashreplace")


def stamps_of(files: Sequence[Path]) -> dict[Path, tuple[int, int] | None]:
    """Return size and modification time of each file; None for what is not a file, or is gone."""
    stats = {path: path.stat() if path.is_file() else None for path in files}
    return {path: stat and (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


def can_be_resumed(files: Sequence[Path]) -> bool:
    """Return whether all inputs can be read again, which a pipe cannot."""
    return None not in stamps_of(files).values()


def comparable_size(files: Sequence[Path]) -> int | None:
    """Return the bytes of text in the input; None unless all files are uncompressed text."""
    if any(is_parquet(path) or compression_of(path) for path in files):
        return None
    return sum(path.stat().st_size for path in files)
