"""Corpora on disk as an ordered stream of chunks of raw records.

A chunk holds whole records of one file and the position after it, from which a resumed run goes on.
Formats are JSON Lines (`.jsonl`, `.json`), JSON arrays (`.json`) and parquet; text formats may be
compressed with gzip, zstd, bzip2 or xz.
"""

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_smlp.data.errors import DataError, require_package
from megatron_smlp.data.pairs.manifest import is_manifest
from megatron_smlp.data.prepare.compression import DamagedInputError, compression_of, text_blocks

CHUNK_BYTES = 2 << 20
PARQUET_ROWS = 1024
PARQUET_MAGIC = b"PAR1"
KNOWN_SUFFIXES = tuple(
    text + packed
    for text in (".jsonl", ".json", ".ndjson")
    for packed in ("", ".gz", ".zst", ".bz2", ".xz")
)
UTF8_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Position:
    """A place between two records of the input."""

    file: int = 0
    """Number of the file in the list of inputs."""
    offset: int = 0
    """Bytes of uncompressed text for lines, records for arrays and parquet."""
    line: int = 0
    """Lines (or records) before this place."""


@dataclass(frozen=True)
class Chunk:
    """Whole records, in the order of the input."""

    file: str
    first_line: int
    """Number of the first record in its file, from 1."""
    payload: bytearray | list[tuple[Any, ...]]
    """Raw lines, or for parquet one tuple of values a record, in the order of the keys."""
    end: Position
    num_bytes: int
    """Uncompressed size, for bounds and progress."""
    damage: str | None = None
    """Why the file cannot be read beyond this chunk (which then has no records)."""

    def release(self) -> None:
        """Free the records once they are parsed or sent: one alone may fill a gigabyte."""
        self.payload.clear()


def find_inputs(patterns: Sequence[str]) -> list[Path]:
    """Files named by paths, globs and folders (searched recursively), sorted within each.

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
    """Hidden files, and what these tools write: it may lie in the folder of the corpus."""
    if path.name.startswith(".") or path.name.endswith(".rejected.jsonl"):
        return True
    return path.parent.suffix == ".partial" or (path.suffix == ".json" and is_manifest(path))


def read_chunks(
    files: Sequence[Path], *, keys: Sequence[str], start: Position = Position()
) -> Iterator[Chunk]:
    """Chunks of all files from `start` on. A damaged file yields what is before the damage, then
    one chunk that carries the reason."""
    for number in range(start.file, len(files)):
        begin = start if number == start.file else Position(number)
        yield from _read_file(files[number], keys=keys, begin=begin)


def _read_file(path: Path, *, keys: Sequence[str], begin: Position) -> Iterator[Chunk]:
    position = begin
    try:
        for chunk in _records(path, keys=keys, begin=begin):
            position = chunk.end
            yield chunk
    except DamagedInputError as damage:
        end = Position(begin.file + 1)
        yield Chunk(str(path), position.line + 1, bytearray(), end, 0, damage=str(damage))


def _records(path: Path, *, keys: Sequence[str], begin: Position) -> Iterator[Chunk]:
    if _is_parquet(path):
        return _parquet_chunks(path, keys=keys, begin=begin)
    if ".json" in path.suffixes and path.is_file() and _starts_with_bracket(path):
        from megatron_smlp.data.prepare.json_arrays import array_chunks

        return array_chunks(path, begin=begin)
    return _line_chunks(path, begin=begin)


def _is_parquet(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return path.suffix == ".parquet" or stream.read(4) == PARQUET_MAGIC


def _starts_with_bracket(path: Path) -> bool:
    try:
        for block in text_blocks(path):
            text = block.removeprefix(UTF8_BOM).lstrip()
            if text:
                return text.startswith(b"[")
    except DamagedInputError:
        pass  # Reported with its place when the records are read.
    return False


def _line_chunks(path: Path, *, begin: Position) -> Iterator[Chunk]:
    """Cut the text at line ends into chunks of about CHUNK_BYTES; a longer line stays whole."""
    offset, line = begin.offset, begin.line
    buffer = bytearray()
    cut = 0  # End of the last whole line in `buffer`: only new blocks are searched.
    try:
        for block in text_blocks(path, skip=begin.offset):
            at = block.rfind(b"\n")
            cut = len(buffer) + at + 1 if at >= 0 else cut
            buffer += block
            if len(buffer) >= CHUNK_BYTES and cut:
                rest = buffer[cut:]
                del buffer[cut:]
                chunk = _line_chunk(path, buffer, begin.file, offset, line)
                offset, line = chunk.end.offset, chunk.end.line
                buffer, cut = rest, 0
                yield chunk
    except DamagedInputError:
        del buffer[cut:]  # The line that the damage cuts in two is no record.
        if buffer:
            yield _line_chunk(path, buffer, begin.file, offset, line)
        raise
    if buffer:
        yield _line_chunk(path, buffer, begin.file, offset, line)


def _line_chunk(path: Path, payload: bytearray, file: int, offset: int, line: int) -> Chunk:
    lines = payload.count(b"\n") + (not payload.endswith(b"\n"))
    end = Position(file, offset + len(payload), line + lines)
    return Chunk(str(path), line + 1, payload, end, len(payload))


def _parquet_chunks(path: Path, *, keys: Sequence[str], begin: Position) -> Iterator[Chunk]:
    require_package("pyarrow", purpose=f"--input {path}", extra="pyarrow")
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise DamagedInputError(f"no readable parquet file: {error}") from None
    missing = [key for key in keys if key not in table.schema_arrow.names]
    if missing:
        names = ", ".join(table.schema_arrow.names)
        raise DataError(f"--json-keys {missing[0]}: {path} has only the columns {names}")
    row = 0
    try:
        for batch in table.iter_batches(batch_size=PARQUET_ROWS, columns=list(keys)):
            first, row = row, row + batch.num_rows
            if row > begin.offset:
                rows = batch.slice(max(0, begin.offset - first))
                values = list(zip(*(rows.column(key).to_pylist() for key in keys), strict=True))
                end = Position(begin.file, row, row)
                yield Chunk(str(path), row - len(values) + 1, values, end, rows.nbytes)
    except (pyarrow.ArrowException, OSError) as error:
        raise DamagedInputError(f"damaged parquet file: {error}") from None


def describe_inputs(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Name, size in bytes and compression of each file, for the manifest."""
    return [
        {"file": shown(path), "bytes": path.stat().st_size, "compression": compression_of(path)}
        for path in files
    ]


def shown(path: Path) -> str:
    """Its name as text, where a byte of it is no character too."""
    return os.fsencode(path).decode("utf-8", errors="backslashreplace")


def stamps_of(files: Sequence[Path]) -> list[tuple[int, int] | None]:
    """Size and time of the last change of each file; None for what is no file, or is gone."""
    return [_stamp(path) for path in files]


def _stamp(path: Path) -> tuple[int, int] | None:
    if not path.is_file():
        return None
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def comparable_size(patterns: Sequence[str]) -> int | None:
    """Bytes of text in the input, where that is known beforehand: plain text files only."""
    files = find_inputs(patterns)
    if any(_is_parquet(path) or compression_of(path) for path in files):
        return None
    return sum(path.stat().st_size for path in files)
