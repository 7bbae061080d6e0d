"""Read corpora on disk as an ordered stream of chunks of raw records.

A chunk has whole records of one file and the position after it, at which a resumed run continues.
Formats are JSON Lines (`.jsonl`, `.json`), JSON arrays (`.json`) and parquet; text formats may be
compressed with gzip, zstd, bzip2 or xz.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_smlp.data.prepare.chunks import CHUNK_BYTES, START, Chunk, Position
from megatron_smlp.data.prepare.compression import DamagedInputError, text_blocks
from megatron_smlp.errors import DataError, require_package

PARQUET_ROWS = 1024
"""Most rows of a parquet file to read at once."""
BUFFER_BYTES = 1 << 20
UTF8_BOM = b"\xef\xbb\xbf"


def read_chunks(
    files: Sequence[Path], *, keys: Sequence[str], start: Position = START
) -> Iterator[Chunk]:
    """Yield the chunks of all files from `start` on.

    A damaged file yields what precedes the damage, then one chunk that carries the reason.
    """
    for number in range(start.file, len(files)):
        path = files[number]
        position = start if number == start.file else Position(number)
        try:
            for chunk in _records(path, keys=keys, begin=position):
                position = chunk.end
                yield chunk
        except DamagedInputError as damage:
            end = Position(number + 1)
            yield Chunk(str(path), position.line + 1, bytearray(), end, 0, damage=str(damage))


def _records(path: Path, *, keys: Sequence[str], begin: Position) -> Iterator[Chunk]:
    if path.suffix == ".parquet":
        return _parquet_chunks(path, keys=keys, begin=begin)
    if ".json" in path.suffixes and path.is_file() and _starts_with_bracket(path):
        return _array_chunks(path, begin=begin)
    return _line_chunks(path, begin=begin)


def _starts_with_bracket(path: Path) -> bool:
    try:
        for block in text_blocks(path):
            text = block.removeprefix(UTF8_BOM).lstrip()
            if text:
                return text.startswith(b"[")
    except DamagedInputError:
        pass  # Reported with its place when the records are read.
    return False


def _array_chunks(path: Path, *, begin: Position) -> Iterator[Chunk]:
    """Read a whole array of objects, and yield those after the first `begin.offset`, one per line.

    Raises:
        DamagedInputError: it is not a JSON array, or is incomplete.
    """
    body = b"".join(text_blocks(path))
    try:
        elements = json.loads(body)
    # Also a number with more digits than Python converts, or nesting beyond its recursion limit.
    except (ValueError, RecursionError) as error:
        raise DamagedInputError(f"bad JSON in the array: {error}") from None
    payload = bytearray()
    first = begin.offset + 1
    for number, element in enumerate(elements[begin.offset :], start=first):
        payload += json.dumps(element).encode() + b"\n"
        if len(payload) >= CHUNK_BYTES or number == len(elements):
            end = Position(begin.file, number, number)
            yield Chunk(str(path), first, payload, end, len(payload))
            payload, first = bytearray(), number + 1


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
        del buffer[cut:]  # The line that the damage cuts off is not a record.
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
        # Read page by page: otherwise a whole row group is read at once.
        table = pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=BUFFER_BYTES)
    except pyarrow.ArrowException as error:
        raise DamagedInputError(f"not a readable parquet file: {error}") from None
    names = table.schema_arrow.names
    for key in keys:
        if key not in names:
            raise DataError(
                f"--json-keys {key}: {path} has no such column; it has {', '.join(names)}"
            )
    row = 0
    try:
        for batch in _batches(table, keys):
            first, row = row, row + batch.num_rows
            if row > begin.offset:
                at = max(first, begin.offset)
                for rows in _pieces(batch.slice(at - first)):
                    line, at = at + 1, at + rows.num_rows
                    columns = (_values(rows.column(key)) for key in keys)
                    values = list(zip(*columns, strict=True))
                    yield Chunk(str(path), line, values, Position(begin.file, at, at), rows.nbytes)
    except (pyarrow.ArrowException, OSError) as error:
        raise DamagedInputError(f"damaged parquet file: {error}") from None


def _values(column: Any) -> list[Any]:
    """Return the values of a column: texts as bytes if one is not UTF-8, which Arrow does not check
    when it reads."""
    import pyarrow

    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        values = column.cast(pyarrow.large_binary()).to_pylist()
    return values


def _batches(table: Any, keys: Sequence[str]) -> Iterator[Any]:
    """Yield the rows of a file in batches of about CHUNK_BYTES, by the average size of a row."""
    groups = map(table.metadata.row_group, range(table.num_row_groups))
    columns = (group.column(place) for group in groups for place in range(group.num_columns))
    size = sum(part.total_uncompressed_size for part in columns if part.path_in_schema in keys)
    num_rows = table.metadata.num_rows * CHUNK_BYTES // max(size, 1)
    return table.iter_batches(max(1, min(PARQUET_ROWS, num_rows)), columns=list(keys))


def _pieces(batch: Any) -> Iterator[Any]:
    """Cut a batch into parts with equal numbers of rows, of about CHUNK_BYTES each."""
    num_rows = max(1, batch.num_rows * CHUNK_BYTES // max(batch.nbytes, CHUNK_BYTES))
    for first in range(0, batch.num_rows, num_rows):
        yield batch.slice(first, num_rows)
