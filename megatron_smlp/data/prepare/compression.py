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
MAGIC = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd", "bzip2": b"BZh", "xz": b"\xfd7zXZ\x00"}
SUFFIXES = {".gz": "gzip", ".zst": "zstd", ".bz2": "bzip2", ".xz": "xz"}


class DamagedInputError(ValueError):
    """A file breaks off or is not what its name says; the message is the reason."""


def compression_of(path: Path) -> str | None:
    """Return the compression by the suffix, or by the first bytes if the suffix does not say."""
    if path.suffix in SUFFIXES:
        return SUFFIXES[path.suffix]
    if not path.is_file():
        return None  # A pipe: reading its bytes would consume them.
    with path.open("rb") as stream:
        return _by_magic(stream.read(8))


def _by_magic(start: bytes) -> str | None:
    return next((kind for kind, magic in MAGIC.items() if start.startswith(magic)), None)


def text_blocks(path: Path, *, skip: int = 0) -> Iterator[bytes]:
    """Yield blocks of uncompressed bytes, without the first `skip`.

    Raises:
        DamagedInputError: after the last readable block.
    """
    kind = compression_of(path)
    with path.open("rb") as stream:
        if kind is None and not path.is_file():
            kind = _by_magic(stream.peek(8))
        if kind is None:
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
    member = new()
    started, is_empty = False, True
    while data := stream.read(COMPRESSED_BLOCK_BYTES):
        is_empty = False
        while data:
            if not started and not data.strip(b"\0"):
                break  # Padding after the last member, as tape and block devices leave it.
            try:
                block = bytes(member.decompress(data))
            # zstandard's error class exists only if it is installed, and derives from Exception.
            except Exception as error:
                raise DamagedInputError(f"the {kind} data is damaged: {error}") from None
            started = True
            yield from (block[at : at + BLOCK_BYTES] for at in range(0, len(block), BLOCK_BYTES))
            data = b""
            if member.eof:
                data, member, started = member.unused_data, new(), False
    if started or is_empty:
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
