"""Megatron's indexed dataset on disk: the pair `PREFIX.bin` / `PREFIX.idx`, without torch.

    .idx   magic[9] | version u64 | dtype code u8 | S u64 | D u64
           lengths int32[S] | byte pointers int64[S] | document starts int64[D]
    .bin   the token ids, one after another

S = sequences, D = documents + 1. All numbers are little-endian. Pairs equal those of Megatron's
`IndexedDatasetBuilder` byte for byte, as tests/unit/data/prepare/test_same_bytes.py checks.
"""

import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_smlp.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPE_CODES: dict[int, np.dtype[Any]] = {4: np.dtype("int32"), 8: np.dtype("uint16")}
UINT16_VOCABULARY_LIMIT = 65500
COPY_ITEMS = 1 << 20


def optimal_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return Megatron's choice of id type: uint16 under 65,500 entries, else int32."""
    return np.dtype("uint16") if vocab_size < UINT16_VOCABULARY_LIMIT else np.dtype("int32")


@dataclass(frozen=True)
class Index:
    """A pair opened for reading; arrays are memory maps, so that even a huge pair opens at once."""

    prefix: str
    dtype: np.dtype[Any]
    lengths: NDArray[np.int32]
    """<int32>[S], tokens of each sequence."""
    pointers: NDArray[np.int64]
    """<int64>[S], byte offsets into `.bin`."""
    documents: NDArray[np.int64]
    """<int64>[D], index of the first sequence of each document, then S."""

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    @property
    def num_documents(self) -> int:
        return len(self.documents) - 1

    @property
    def num_tokens(self) -> int:
        return sum(int(part.sum(dtype=np.int64)) for part in in_parts(self.lengths))

    @property
    def expected_bin_bytes(self) -> int:
        """Size of `.bin` according to the index: the end of the last sequence."""
        if self.num_sequences == 0:
            return 0
        return int(self.pointers[-1]) + int(self.lengths[-1]) * self.dtype.itemsize

    @cached_property
    def tokens(self) -> NDArray[Any]:
        """<dtype>[tokens], a memory map of `.bin`."""
        return mapped(bin_path(self.prefix), self.dtype)

    def tokens_of(self, first: int, last: int) -> NDArray[Any]:
        """Return <dtype>[tokens] of sequences `first` to `last` (exclusive), as a memory map."""
        if first == last:
            return self.tokens[:0]
        begin = int(self.pointers[first]) // self.dtype.itemsize
        end = int(self.pointers[last - 1]) // self.dtype.itemsize + int(self.lengths[last - 1])
        return self.tokens[begin:end]

    def document(self, number: int) -> NDArray[Any]:
        """Return <dtype>[tokens] of document `number`."""
        return self.tokens_of(*self.documents[number : number + 2].tolist())


def bin_path(prefix: str) -> Path:
    return Path(prefix + ".bin")


def idx_path(prefix: str) -> Path:
    return Path(prefix + ".idx")


def strip_suffix(name: str) -> str:
    """Return `PREFIX`, from `PREFIX`, `PREFIX.bin` or `PREFIX.idx`."""
    return name[:-4] if name.endswith((".bin", ".idx")) else name


def refuse_existing(prefixes: Iterable[str], *, output_prefix: str, why: str = "") -> None:
    """Raise DataError if one of the pairs that a tool is about to write already exists."""
    for prefix in prefixes:
        if bin_path(prefix).exists() or idx_path(prefix).exists():
            raise DataError(
                f"--output-prefix {output_prefix}: {prefix}.bin already exists{why}; give "
                "--overwrite to replace it, or another prefix"
            )


def damage(path: Path, what: str) -> DataError:
    """Return the error that says what is wrong with an `.idx`."""
    return DataError(f"{path} is damaged: {what}; preprocess again")


def in_parts(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Cut `array` into views of at most COPY_ITEMS entries, to bound memory."""
    for start in range(0, len(array), COPY_ITEMS):
        yield array[start : start + COPY_ITEMS]


def open_index(prefix: str) -> Index:
    """Open a pair and check its header and its sizes; quick for any size.

    Raises:
        DataError: a file is missing or empty, the header is damaged, or the sizes disagree.
    """
    for path in (idx_path(prefix), bin_path(prefix)):
        if not path.is_file():
            raise _missing(prefix, path)
    path = idx_path(prefix)
    dtype, sequences, starts = _read_header(path)
    expected, size = HEADER.size + 12 * sequences + 8 * starts, path.stat().st_size
    if size != expected:
        what = f"{size} bytes, but {sequences} sequences and {starts} document starts need"
        raise damage(path, f"{what} {expected}")
    lengths_at = HEADER.size
    pointers_at = lengths_at + 4 * sequences
    documents_at = pointers_at + 8 * sequences
    index = Index(
        prefix=prefix,
        dtype=dtype,
        lengths=mapped(path, "<i4", offset=lengths_at, count=sequences),
        pointers=mapped(path, "<i8", offset=pointers_at, count=sequences),
        documents=mapped(path, "<i8", offset=documents_at, count=starts),
    )
    _check_ends(index)
    return index


def _missing(prefix: str, path: Path) -> DataError:
    names = sorted(index.stem for index in path.parent.glob("*.idx"))
    nearby = f"; that folder has: {', '.join(names[:5])}" if names else ""
    return DataError(
        f"no dataset at {prefix!r}: {path} does not exist{nearby} (give the path without .bin/.idx)"
    )


def _read_header(path: Path) -> tuple[np.dtype[Any], int, int]:
    with path.open("rb") as stream:
        raw = stream.read(HEADER.size)
    if len(raw) < HEADER.size:
        raise damage(path, f"{len(raw)} bytes, but a header has {HEADER.size}")
    magic, version, code, sequences, starts = HEADER.unpack(raw)
    if magic != MAGIC or version != 1 or code not in DTYPE_CODES:
        raise DataError(
            f"{path} is not a Megatron index of token ids: its header is {magic!r}, version "
            f"{version}, type code {code}; expected {MAGIC!r}, 1 and one of {list(DTYPE_CODES)}"
        )
    return DTYPE_CODES[code], sequences, starts


def mapped(
    path: Path, dtype: str | np.dtype[Any], *, offset: int = 0, count: int | None = None
) -> NDArray[Any]:
    """Return <dtype>[count] as a memory map of a file, by default all of it."""
    if count is None:
        count = path.stat().st_size // np.dtype(dtype).itemsize
    if count == 0:  # which cannot be mapped
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,))


def _check_ends(index: Index) -> None:
    path = idx_path(index.prefix)
    starts = index.documents
    if len(starts) == 0 or starts[0] != 0 or starts[-1] != index.num_sequences:
        what = f"document starts must run from 0 to the {index.num_sequences} sequences"
        raise damage(path, f"{what}, but run from {starts[:1]} to {starts[-1:]}")
    if index.num_sequences and index.pointers[0] != 0:
        raise damage(path, f"the first sequence starts at byte {index.pointers[0]}")
    size = bin_path(index.prefix).stat().st_size
    if size != index.expected_bin_bytes:
        raise DataError(
            f"{bin_path(index.prefix)} has {size} bytes, but its index describes "
            f"{index.expected_bin_bytes}: truncated, or .bin and .idx do not belong together"
        )


def write_index(
    path: Path,
    *,
    dtype: np.dtype[Any],
    lengths: NDArray[np.int32],
    sequences_per_document: NDArray[np.int32],
) -> None:
    """Write an `.idx` file from flat arrays, in parts, so that memory does not grow with them.

    Args:
        lengths: <int32>[S], tokens of each sequence.
        sequences_per_document: <int32>[documents], 0 for an empty document.
    """
    code = next(code for code, known in DTYPE_CODES.items() if known == dtype)
    with path.open("wb") as stream:
        stream.write(HEADER.pack(MAGIC, 1, code, len(lengths), len(sequences_per_document) + 1))
        for part in in_parts(lengths):
            stream.write(part.astype("<i4").tobytes())
        _write_running_sums(stream, lengths, scale=dtype.itemsize)
        stream.write(struct.pack("<q", 0))
        _write_running_sums(stream, sequences_per_document, inclusive=True)
        stream.flush()
        os.fsync(stream.fileno())  # Its sources are deleted once it has its name.


def _write_running_sums(
    stream: BinaryIO, counts: NDArray[np.int32], *, scale: int = 1, inclusive: bool = False
) -> None:
    """Write the running sum of `counts * scale` before (or, if inclusive, after) each entry."""
    total = 0
    for part in in_parts(counts):
        sums = np.cumsum(part, dtype=np.int64) * scale + total
        total_after = int(sums[-1])
        if not inclusive:
            sums = np.concatenate(([total], sums[:-1]))
        stream.write(sums.astype("<i8").tobytes())
        total = total_after
