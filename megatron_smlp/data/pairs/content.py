"""Identify the content of a pair by one checksum, since its name and dates do not.

Megatron's caches, checkpoints and a running job use it to recognize a dataset, so that another one
under the same name is never mistaken for the one that they were made for.
"""

import hashlib
from functools import cache
from pathlib import Path

from megatron_smlp.data.pairs.indexed import bin_path, idx_path
from megatron_smlp.data.pairs.manifest import sha256_of
from megatron_smlp.errors import DataError

WHOLE_BYTES = 256 << 20
"""A `.bin` up to this size is read in full, which takes less than a second."""
NUM_BLOCKS = 64
BLOCK_BYTES = 1 << 20

State = tuple[int, ...]


class ChangedDataError(DataError):
    """A dataset is no longer what a run began with. Any rank may be the only one to notice."""

    speaker = ""

    def __init__(self, text: str) -> None:
        # A data loader's worker passes on its traceback, whose last line is the message.
        super().__init__(text.rpartition(f"{type(self).__name__}: ")[2])


def content_of(prefix: str) -> str:
    """Return a SHA-256 over `.idx` and `.bin`, or only 64 MiB spread over a large `.bin`.

    Raises:
        OSError: a file is missing or unreadable.
    """
    return _content(prefix, state_of(prefix))


def state_of(prefix: str) -> tuple[State, ...]:
    """Return device, inode, size and modification time of both files, equal until one is written.

    Raises:
        OSError: a file is missing.
    """
    return _state(bin_path(prefix)), _state(idx_path(prefix))


def _state(path: Path) -> State:
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def sha256_once(path: Path) -> str:
    """Return the SHA-256 of a file, which a process reads only once unless it is written to."""
    return _sha256(path, _state(path))


# `state` only serves as part of the cache key.
@cache
def _sha256(path: Path, state: State) -> str:
    return sha256_of(path)


@cache
def _content(prefix: str, state: tuple[State, ...]) -> str:
    digest = hashlib.sha256(sha256_once(idx_path(prefix)).encode())
    path = bin_path(prefix)
    size = path.stat().st_size
    if size <= WHOLE_BYTES:
        digest.update(sha256_once(path).encode())
        return digest.hexdigest()
    digest.update(size.to_bytes(8, "little"))
    with path.open("rb") as stream:
        for start in block_starts(size):
            stream.seek(start)
            digest.update(stream.read(BLOCK_BYTES))
    return digest.hexdigest()


def block_starts(size: int) -> list[int]:
    """Return the byte offsets of the blocks that represent a `.bin` of this size."""
    return [number * (size - BLOCK_BYTES) // (NUM_BLOCKS - 1) for number in range(NUM_BLOCKS)]


class Watch:
    """Detects whether a pair changes while it is read. Memory maps show what is written to a file,
    and a process that reads beyond the end of a truncated one is killed.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.state = state_of(prefix)
        self.content = content_of(prefix)

    def look(self) -> None:
        """Check that the pair is unchanged; takes microseconds unless somebody has written to it.

        Raises:
            ChangedDataError: it is gone, truncated, or has other content.
        """
        try:
            state = state_of(self.prefix)
            if state == self.state:
                return
            is_same = content_of(self.prefix) == self.content
        except OSError as error:
            raise self._changed(f"{error.filename}: {error.strerror}") from None
        if not is_same:
            raise self._changed("its content differs from the start")
        self.state = state  # same content: copied again, or touched

    def _changed(self, what: str) -> ChangedDataError:
        return ChangedDataError(
            f"the dataset {self.prefix!r} changed while this run was reading it ({what}): restore "
            "its files, and resume from the last checkpoint with the same command."
        )
