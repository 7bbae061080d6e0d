"""Read compressed text as a stream of blocks that reports where it breaks off.

The libraries' own file objects end silently if a file is truncated (zstandard) or a later member is
damaged (bz2, lzma): docs/decisions/0061-libraries-of-the-data-tools.md.
"""

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

BLOCK_BYTES = 1 << 20
# Small, because a compressed block may grow a thousandfold.
COMPRESSED_BLOCK_BYTES = 1 << 16
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bzip2", ".xz": "xz"}


class DamagedInputError(ValueError):
    """A file breaks off or is not what its name says; the message is the reason."""


def text_blocks(path: Path, *, skip: int = 0) -> Iterator[bytes]:
    """Yield blocks of uncompressed bytes, without the first `skip`.

    Raises:
        DamagedInputError: after the last readable block.
    """
    with path.open("rb") as stream:
        if (kind := COMPRESSIONS.get(path.suffix)) is None:
            if skip:
                stream.seek(skip)
            yield from iter(lambda: stream.read(BLOCK_BYTES), b"")
            return
        for block in _decompressed(stream, kind):
            if skip < len(block):
                yield block[skip:]
            skip = max(0, skip - len(block))


def _decompressed(stream: BinaryIO, kind: str) -> Iterator[bytes]:
    """Decompress member by member: gzip and zstd files are often several members concatenated."""
    new = _decompressor(kind)
    member, is_whole = new(), False
    while data := stream.read(COMPRESSED_BLOCK_BYTES):
        while data:
            try:
                block = bytes(member.decompress(data))
            # zstandard's error class exists only if it is installed, and derives from Exception.
            except Exception as error:
                raise DamagedInputError(f"the {kind} data is damaged: {error}") from None
            yield from (block[at : at + BLOCK_BYTES] for at in range(0, len(block), BLOCK_BYTES))
            is_whole, data = member.eof, b""
            if is_whole:
                data, member = member.unused_data, new()
    if not is_whole:
        raise DamagedInputError(f"the {kind} data is truncated")


def _decompressor(kind: str) -> Callable[[], Any]:
    if kind == "gzip":
        return lambda: zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    if kind == "bzip2":
        return bz2.BZ2Decompressor
    if kind == "xz":
        return lzma.LZMADecompressor
    import zstandard

    # The largest window that `zstd --long` makes; memory is allocated only for files that use it.
    return lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
