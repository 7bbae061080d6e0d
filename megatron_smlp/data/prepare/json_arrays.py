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

    def character(self) -> str:
        """Return the next character that is not white space; the place is before it afterwards.

        Raises:
            DamagedInputError: there is none.
        """
        while True:
            self.at = SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text):
                return self.text[self.at]
            self.text, self.at = self.block(), 0

    def block(self) -> str:
        """Return the next block of text.

        Raises:
            DamagedInputError: there is none.
        """
        for block in self.blocks:
            if block:
                return block
        raise DamagedInputError("the array is not closed: ']' is missing")

    def element(self) -> str:
        """Return the element at the place, which is behind it afterwards.

        Raises:
            DamagedInputError: it is not JSON, or not whole at the end of the file.
        """
        while True:
            try:
                _, end = DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if not self._may_be_cut_off(error):
                    raise DamagedInputError(f"bad JSON in the array: {error}") from None
                self._read_on(error)
            # A number of more digits than Python converts, or nesting deeper than it follows.
            except (ValueError, RecursionError) as error:
                raise DamagedInputError(f"bad JSON in the array: {error}") from None
            else:
                element, self.at = self.text[self.at : end], end
                return element

    def _may_be_cut_off(self, error: json.JSONDecodeError) -> bool:
        """Return whether more text may mend it: else a bad element would read the whole file."""
        is_at_end = error.pos >= len(self.text) - LONGEST_WORD
        return is_at_end or error.msg.startswith("Unterminated string")

    def _read_on(self, error: json.JSONDecodeError) -> None:
        """Forget what is before the element, which may be cut off, or read as much again."""
        if self.at:
            self.text, self.at = self.text[self.at :], 0
            return
        grown = [self.text]
        try:
            while sum(map(len, grown)) < 2 * len(self.text) + 1:
                grown.append(self.block())
        except DamagedInputError:
            if len(grown) == 1:
                raise DamagedInputError(f"bad JSON in the array: {error}") from None
        self.text = "".join(grown)


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
    if text.character() != "[":
        raise DamagedInputError(f"'[' expected, not {text.character()!r}")
    text.at += 1
    is_first = True
    while (character := text.character()) != "]":
        if not is_first:
            if character != ",":
                raise DamagedInputError(f"',' or ']' expected in the array, not {character!r}")
            text.at += 1
            text.character()
        is_first = False
        # Outside of strings a line end is white space, and within them it is not valid JSON.
        yield text.element().replace("\n", " ").replace("\r", " ").encode() + b"\n"
    for block in itertools.chain([text.text[text.at + 1 :]], text.blocks):
        if rest := block.strip(" \t\r\n"):
            raise DamagedInputError(
                f"{rest[:20]!r} follows the array: a file holds one array, or an object a line"
            )
