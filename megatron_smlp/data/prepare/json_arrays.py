"""A `.json` file that holds one array of objects, as chunks of one object a line."""

import codecs
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

from megatron_smlp.data.prepare.compression import DamagedInputError, text_blocks
from megatron_smlp.data.prepare.sources import CHUNK_BYTES, Chunk, Position

SPACE = " \t\r\n"


def array_chunks(path: Path, *, begin: Position) -> Iterator[Chunk]:
    """Elements of the array in `path` after the first `begin.offset`.

    Raises:
        DamagedInputError: after the last readable element.
    """
    lines: list[bytes] = []
    number = size = 0
    try:
        for element in _elements(path):
            number += 1
            if number > begin.offset:
                lines.append(element)
                size += len(element)
            if size >= CHUNK_BYTES:
                yield _chunk(path, lines, begin.file, number)
                lines, size = [], 0
    except DamagedInputError:
        if lines:
            yield _chunk(path, lines, begin.file, number)
        raise
    if lines:
        yield _chunk(path, lines, begin.file, number)


def _chunk(path: Path, lines: list[bytes], file: int, last: int) -> Chunk:
    payload = bytearray().join(lines)
    end = Position(file, last, last)
    return Chunk(str(path), last - len(lines) + 1, payload, end, len(payload))


def _elements(path: Path) -> Iterator[bytes]:
    """Each element as one line. The text is held only around the current element."""
    blocks = _decoded_blocks(path)
    decoder = json.JSONDecoder()
    text, at = _next_text(blocks, "", 0, wanted="[")
    at += 1
    first = True
    while True:
        text, at = _skip_space(blocks, text, at)
        if text[at] == "]":
            _check_end(blocks, text[at + 1 :])
            return
        if not first:
            if text[at] != ",":
                raise DamagedInputError(f"',' or ']' expected in the array, not {text[at]!r}")
            text, at = _skip_space(blocks, text, at + 1)
        text, end = _element_end(decoder, blocks, text[at:])
        # Outside of strings a line end is white space, and within them it is not valid JSON.
        yield text[:end].replace("\n", " ").replace("\r", " ").encode() + b"\n"
        text, at, first = text[end:], 0, False


def _decoded_blocks(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    try:
        for block in text_blocks(path):
            yield decoder.decode(block)
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise DamagedInputError(f"invalid UTF-8 in the array: {error.reason}") from None


def _next_text(blocks: Iterator[str], text: str, at: int, *, wanted: str) -> tuple[str, int]:
    text, at = _skip_space(blocks, text, at)
    if text[at] != wanted:
        raise DamagedInputError(f"{wanted!r} expected, not {text[at]!r}")
    return text, at


def _skip_space(blocks: Iterator[str], text: str, at: int) -> tuple[str, int]:
    while True:
        while at < len(text) and text[at] in SPACE:
            at += 1
        if at < len(text):
            return text, at
        text, at = _more(blocks), 0


def _check_end(blocks: Iterator[str], text: str) -> None:
    """Raise `DamagedInputError` where something follows the array."""
    for block in itertools.chain([text], blocks):
        rest = block.strip(SPACE)
        if rest:
            raise DamagedInputError(
                f"{rest[:20]!r} follows the array: a file holds one array, or an object a line"
            )


def _element_end(decoder: json.JSONDecoder, blocks: Iterator[str], text: str) -> tuple[str, int]:
    """(text, end of the element that it starts with); while that is cut off, read on."""
    while True:
        try:
            _, end = decoder.raw_decode(text)
        except json.JSONDecodeError as error:
            grown = [text]
            try:
                while sum(map(len, grown)) < 2 * len(text) + 1:
                    grown.append(_more(blocks))
            except DamagedInputError:
                if len(grown) == 1:
                    raise DamagedInputError(f"bad JSON in the array: {error}") from None
            text = "".join(grown)
        # A number of more digits than Python converts, or nesting deeper than it follows.
        except (ValueError, RecursionError) as error:
            raise DamagedInputError(f"bad JSON in the array: {error}") from None
        else:
            return text, end


def _more(blocks: Iterator[str]) -> str:
    for block in blocks:
        if block:
            return block
    raise DamagedInputError("the array is not closed: ']' is missing")
