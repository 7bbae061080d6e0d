"""A `.json` file that holds one array of objects, read whole, as chunks of one object a line."""

import json
from collections.abc import Iterator
from pathlib import Path

from megatron_smlp.data.prepare.chunks import CHUNK_BYTES, Chunk, Position
from megatron_smlp.data.prepare.compression import DamagedInputError, text_blocks


def array_chunks(path: Path, *, begin: Position) -> Iterator[Chunk]:
    """Yield the elements of the array in `path` after the first `begin.offset`.

    Raises:
        DamagedInputError: it is not an array of JSON, or not whole.
    """
    body = b"".join(text_blocks(path))
    try:
        elements = json.loads(body)
    # Others: a number of more digits than Python converts, nesting deeper than it follows.
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
