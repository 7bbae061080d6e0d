"""Write a `.bin`/`.idx` pair through append-only flat files, and give finished pairs their names.

    STEM.bin        token ids
    STEM.lengths    int32, tokens of each sequence
    STEM.sequences  int32, sequences of each document
    STEM.idx        made from the two above at the end

Memory does not grow with the data, and a crash loses at most what came after the last `commit`.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_smlp.data.pairs.indexed import bin_path, idx_path, in_parts, mapped, write_index
from megatron_smlp.data.pairs.manifest import (
    Manifest,
    PairRecord,
    fingerprint_of,
    sha256_of,
)
from megatron_smlp.durable import link_durably, naming_errors
from megatron_smlp.errors import DataError

STREAMS = ("bin", "lengths", "sequences")


def append_to(path: Path, *, committed: int) -> BinaryIO:
    """Open `path` for appending at `committed` bytes, dropping what a crash left after them.

    If nothing is kept, start a new file: the old one may be a hard link to a published file.

    Raises:
        DataError: the file is shorter than that.
    """
    if not committed:
        path.unlink(missing_ok=True)
    stream = path.open("ab")
    if stream.tell() < committed:
        stream.close()
        raise DataError(f"{path} is shorter than its journal says; start again without --resume")
    stream.truncate(committed)
    stream.seek(0, os.SEEK_END)  # `flush_to_disk` returns the position as the size
    return stream


def flush_to_disk(stream: BinaryIO) -> int:
    """Flush, and return the size of the file in bytes."""
    stream.flush()
    os.fsync(stream.fileno())
    return stream.tell()


class PairWriter:
    """Appends documents to the files of one pair."""

    def __init__(
        self,
        stem: Path,
        *,
        dtype: np.dtype[Any],
        committed: dict[str, int] | None = None,
        max_id: int = -1,
    ) -> None:
        """Args:
        committed: bytes of each stream at the last commit; None starts empty.
        """
        sizes = committed or dict.fromkeys(STREAMS, 0)
        self.stem, self.dtype, self.max_id = stem, dtype, max_id
        self.files = {name: append_to(self.path(name), committed=sizes[name]) for name in STREAMS}
        with self.path("bin").open("rb") as stream:
            self.digest = hashlib.file_digest(stream, "sha256")

    def path(self, stream: str) -> Path:
        return self.stem.with_name(f"{self.stem.name}.{stream}")

    def write(
        self,
        ids: NDArray[Any],
        *,
        lengths: NDArray[np.int32],
        sequences: NDArray[np.integer[Any]],
    ) -> None:
        """Append documents.

        Args:
            ids: <int>[tokens], within the range of the pair's dtype.
            lengths: <int32>[sequences], tokens of each.
            sequences: <int>[documents], sequences of each.
        """
        with naming_errors(self.path("bin")):
            for part in in_parts(ids):
                raw = part.astype(self.dtype).tobytes()
                self.digest.update(raw)
                self.files["bin"].write(raw)
                self.max_id = max(self.max_id, int(part.max()))
            self.files["lengths"].write(lengths.astype("<i4").tobytes())
            self.files["sequences"].write(sequences.astype("<i4").tobytes())

    def commit(self) -> dict[str, int]:
        """Flush everything to disk, and return the size of each stream in bytes."""
        with naming_errors(self.path("bin")):
            return {name: flush_to_disk(stream) for name, stream in self.files.items()}

    def close(self) -> None:
        """Close the files, ignoring errors: what matters is committed, or its error was raised."""
        for stream in self.files.values():
            with contextlib.suppress(OSError):
                stream.close()

    def finish(self, *, key: str, level: str) -> PairRecord:
        """Close the files and write the index; return the pair's record for the manifest."""
        self.commit()
        self.close()
        lengths, sequences = (mapped(self.path(name), "<i4") for name in STREAMS[1:])
        data, index = self.path("bin"), self.path("idx")
        with naming_errors(index):
            index.unlink(missing_ok=True)  # It may be a hard link to a published file.
            write_index(index, dtype=self.dtype, lengths=lengths, sequences_per_document=sequences)
        return PairRecord(
            key=key,
            level=level,
            dtype=self.dtype.name,
            documents=len(sequences),
            sequences=len(lengths),
            tokens=data.stat().st_size // self.dtype.itemsize,
            max_id=self.max_id,
            bin_bytes=data.stat().st_size,
            idx_bytes=index.stat().st_size,
            bin_sha256=self.digest.hexdigest(),
            idx_sha256=sha256_of(index),
            fingerprint=fingerprint_of(data, index),
        )


def publish(
    writers: dict[str, PairWriter], *, manifest: Manifest | None, manifest_path: Path
) -> None:
    """Give finished pairs their final names: `.idx` last of each pair, the manifest last of all.

    Files of an older run are removed first: a crash in between must not leave a mixed pair.

    Args:
        writers: the writer of each pair, by its final prefix.
        manifest: None if the origin of the ids is not known.
    """
    withdraw(writers, manifest_path=manifest_path)
    for prefix, writer in writers.items():
        link_durably(writer.path("bin"), bin_path(prefix))
        link_durably(writer.path("idx"), idx_path(prefix))
    if manifest is not None:
        manifest.write(manifest_path)


def withdraw(prefixes: Iterable[str], *, manifest_path: Path) -> None:
    """Remove the names that make pairs of an older run readable."""
    manifest_path.unlink(missing_ok=True)
    for prefix in prefixes:
        idx_path(prefix).unlink(missing_ok=True)
