"""A `.json` file that holds one array of objects, as chunks of one object a line."""

import codecs
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

from megatron_smlp.data.prepare.chunks import CHUNK_BYTES, Chunk, Position
from megatron_smlp.data.prepare.compression import DamagedInputError, text_blocks

SPACE = re.compile(r"[ \t\r\n]*")
DECODER = json.JSONDecoder()
LONGEST_WORD = len(r"\ud83d\ude42")
"""Characters that JSON reads as one, beside strings: an error is placed at their start."""


def array_chunks(path: Path, *, begin: Position) -> Iterator[Chunk]:
    """Yield the elements of the array in `path` after the first `begin.offset`.

    Raises:
        DamagedInputError: after the last readable element.
    """
    lines: list[bytes] = []
    number = size = 0
    damage = None
    try:
        for number, element in enumerate(_elements(_Text(path)), start=1):
            if number > begin.offset:
                lines.append(element)
                size += len(element)
            if size >= CHUNK_BYTES:
                yield _chunk(path, lines, begin.file, number)
                lines, size = [], 0
    except DamagedInputError as error:
        damage = error
    if lines:
        yield _chunk(path, lines, begin.file, number)
    if damage is not None:
        raise damage


def _chunk(path: Path, lines: list[bytes], file: int, last: int) -> Chunk:
    payload = bytearray().join(lines)
    end = Position(file, last, last)
    return Chunk(str(path), last - len(lines) + 1, payload, end, len(payload))


class _Text:
    """The decoded file, of which only what is around the current place is held."""

    def __init__(self, path: Path) -> None:
        self.blocks = _decoded_blocks(path)
        self.text, self.at = "", 0

    def grow(self) -> bool:
        """Forget what is before the place, and read as much again; return whether there is more."""
        parts = [self.text[self.at :]]
        wanted = 2 * len(parts[0]) + 1
        for block in self.blocks:
            parts.append(block)
            if sum(map(len, parts)) >= wanted:
                break
        self.text, self.at = "".join(parts), 0
        return len(parts) > 1

    def character(self) -> str:
        """Return the next character that is not white space; the place is before it afterwards.

        Raises:
            DamagedInputError: there is none.
        """
        while True:
            self.at = SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.grow():
                raise DamagedInputError("the array is not closed: ']' is missing")

    def element(self) -> bytes:
        """Return the element at the place as one line; the place is behind it afterwards.

        Raises:
            DamagedInputError: it is not JSON, or not whole at the end of the file.
        """
        self.character()
        while True:
            try:
                _, end = DECODER.raw_decode(self.text, self.at)
            # Others: a number of more digits than Python converts, nesting deeper than it follows.
            except (ValueError, RecursionError) as error:
                if not (self._may_be_cut_off(error) and self.grow()):
                    raise DamagedInputError(f"bad JSON in the array: {error}") from None
            else:
                element, self.at = self.text[self.at : end], end
                # Outside of strings a line end is white space, within them it is not valid JSON.
                return element.replace("\n", " ").replace("\r", " ").encode() + b"\n"

    def _may_be_cut_off(self, error: Exception) -> bool:
        """Return whether more text may mend it: else a bad element would read the whole file."""
        if not isinstance(error, json.JSONDecodeError):
            return False
        is_at_end = error.pos >= len(self.text) - LONGEST_WORD
        return is_at_end or error.msg.startswith("Unterminated string")


def _decoded_blocks(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    try:
        for block in text_blocks(path):
            yield decoder.decode(block)
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise DamagedInputError(f"invalid UTF-8 in the array: {error.reason}") from None


def _elements(text: _Text) -> Iterator[bytes]:
    """Yield each element as one line."""
    if (character := text.character()) != "[":
        raise DamagedInputError(f"'[' expected, not {character!r}")
    text.at += 1
    if text.character() != "]":
        yield text.element()
        while text.character() == ",":
            text.at += 1
            yield text.element()
    if (character := text.character()) != "]":
        raise DamagedInputError(f"',' or ']' expected in the array, not {character!r}")
    for block in itertools.chain([text.text[text.at + 1 :]], text.blocks):
        if rest := block.strip(" \t\r\n"):
            raise DamagedInputError(
                f"{rest[:20]!r} follows the array: a file holds one array, or an object a line"
            )
