"""The content of a pair as one checksum: its name and its dates do not tell it.

Megatron's caches, the checkpoints and a running job know a dataset by it, so that another one under
the same name is never read as the one that they were made for.
"""

import hashlib
from functools import cache
from pathlib import Path

from megatron_smlp.data.pairs.indexed import bin_path, idx_path
from megatron_smlp.data.pairs.manifest import sha256_of
from megatron_smlp.errors import DataError

WHOLE_BYTES = 256 << 20
"""A `.bin` up to this size is read whole, which takes less than a second."""
NUM_BLOCKS = 64
BLOCK_BYTES = 1 << 20

State = tuple[int, ...]


class ChangedDataError(DataError):
    """A dataset is no longer what a run began with. Any rank may be the only one that sees it."""

    speaker = ""

    def __init__(self, text: str) -> None:
        # A data loader's worker passes its traceback on, the last line of which is the message.
        super().__init__(text.rpartition(f"{type(self).__name__}: ")[2])


def content_of(prefix: str) -> str:
    """Return SHA-256 over all of `.idx`, and over all of `.bin` or 64 MiB spread over a larger one.

    Raises:
        OSError: a file is missing or unreadable.
    """
    return _content(prefix, state_of(prefix))


def state_of(prefix: str) -> tuple[State, ...]:
    """Return device, number, size and time of change of both files, equal until somebody writes.

    Raises:
        OSError: a file is missing.
    """
    return _state(bin_path(prefix)), _state(idx_path(prefix))


def _state(path: Path) -> State:
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def sha256_once(path: Path) -> str:
    """Return SHA-256 of a file, which a process reads once until somebody writes to it."""
    return _sha256(path, _state(path))


# `state` is there to be a part of the cache's key.
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
    """Return the bytes at which the blocks begin that stand for a `.bin` of that size."""
    return [number * (size - BLOCK_BYTES) // (NUM_BLOCKS - 1) for number in range(NUM_BLOCKS)]


class Watch:
    """Sees whether a pair changes while it is read. Memory maps show what is written to a file, and
    a process that reads beyond the end of one that was cut short is killed.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.state = state_of(prefix)
        self.content = content_of(prefix)

    def look(self) -> None:
        """Compare; takes microseconds while nobody has written to the pair.

        Raises:
            ChangedDataError: it is gone, cut short, or holds something else.
        """
        try:
            state = state_of(self.prefix)
            if state == self.state:
                return
            is_same = content_of(self.prefix) == self.content
        except OSError as error:
            raise self._changed(f"{error.filename}: {error.strerror}") from None
        if not is_same:
            raise self._changed("its files hold something else than at the start")
        self.state = state  # copied anew, or touched

    def _changed(self, what: str) -> ChangedDataError:
        return ChangedDataError(
            f"the dataset {self.prefix!r} was changed while this run reads it ({what}): put "
            "the same files back, and go on from the last checkpoint by the same command."
        )
