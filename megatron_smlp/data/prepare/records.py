"""Parse raw records into the texts of their keys, or the reasons why they are rejected."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_smlp.data.prepare.chunks import Chunk

EXCERPT_CHARACTERS = 200


@dataclass(frozen=True)
class Rejection:
    """A record that yields no document. `reason` is a short name to count by."""

    file: str
    line: int
    reason: str
    detail: str
    excerpt: str = ""
    """The start of the raw record."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.detail}"


def remedy(keys: Sequence[str]) -> str:
    """Return what to do about a rejected record."""
    names = " and ".join(map(repr, keys))
    return (
        f"expected: parquet, or JSON with a string under {names} in each line, or each object of a "
        ".json array; --json-keys sets other keys, --on-error skip omits bad records"
    )


class _RefusedError(Exception):
    """A record that cannot be used: (reason, detail)."""


def parse_chunk(
    chunk: Chunk, keys: Sequence[str]
) -> Iterator[tuple[int, tuple[str, ...]] | Rejection]:
    """Yield (line, text of each key) or a rejection, for every record of the chunk in order."""
    if chunk.damage is not None:
        yield Rejection(chunk.file, chunk.first_line, "damaged_file", chunk.damage)
        return
    is_table = isinstance(chunk.payload, list)
    records: Iterable[Any] = chunk.payload if is_table else _lines(chunk)
    for line, raw in enumerate(records, start=chunk.first_line):
        try:
            record = dict(zip(keys, raw, strict=True)) if is_table else _parse_json(raw)
            yield line, _texts(record, keys)
        except _RefusedError as refused:
            reason, detail = refused.args
            excerpt = repr(raw)[:EXCERPT_CHARACTERS] if is_table else _excerpt(raw)
            yield Rejection(chunk.file, line, reason, detail, excerpt)


def _lines(chunk: Chunk) -> Iterator[memoryview]:
    payload, start = chunk.payload, 0
    assert isinstance(payload, bytearray)
    view = memoryview(payload)  # Slices of it are not copies.
    while start < len(payload):
        end = payload.find(b"\n", start)
        end = len(payload) if end < 0 else end
        yield view[start:end]
        start = end + 1


def _excerpt(raw: memoryview) -> str:
    return bytes(raw[:EXCERPT_CHARACTERS]).decode("utf-8", errors="backslashreplace")


def _parse_json(raw: memoryview) -> Any:
    try:
        # Decodes a memoryview without copying it first; a byte order mark is no text.
        text = str(raw, "utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise _RefusedError(
            "invalid_utf8", f"invalid UTF-8 at byte {error.start}: {error.reason}"
        ) from None
    if not text.strip():
        raise _RefusedError("blank_line", "blank line")
    try:
        return json.loads(text)
    # Also a number with more digits than Python converts, or nesting beyond its recursion limit.
    except (ValueError, RecursionError) as error:
        raise _RefusedError("bad_json", f"bad JSON: {error}") from None


def _texts(record: Any, keys: Sequence[str]) -> tuple[str, ...]:
    if not isinstance(record, dict):
        detail = f"expected a JSON object, not {type(record).__name__}"
        raise _RefusedError("not_an_object", detail)
    return tuple(_text(record, key) for key in keys)


def _text(record: dict[str, Any], key: str) -> str:
    if key not in record:
        present = ", ".join(list(record)[:8]) or "none"
        raise _RefusedError("missing_key", f"key {key!r} is missing (keys: {present})")
    text = record[key]
    if text is None:
        raise _RefusedError("null_text", f"key {key!r} is null")
    if isinstance(text, bytes):  # of a parquet file
        try:
            return text.decode()
        except UnicodeDecodeError:
            detail = f"key {key!r} holds bytes that are not UTF-8"
            raise _RefusedError("invalid_utf8", detail) from None
    if not isinstance(text, str):
        detail = f"key {key!r} holds {type(text).__name__}, not a string"
        raise _RefusedError("not_a_string", detail)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON escapes can express it, but it is no character
        detail = f"key {key!r} has a lone surrogate at character {error.start + 1}"
        raise _RefusedError("lone_surrogate", detail) from None
    return text
