"""A dataset under construction: `PREFIX.partial/`, committed shard by shard, published at the end.

The folder holds, for each key, the ids, the lengths and the sequences of each document as flat
files that only grow, and a journal: how far into the input, and how long each file was then. What
lies beyond the journal after a crash is cut off by a resumed run.
"""

import fcntl
import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_smlp.data.encoding import EncodedChunk, EncodedKey
from megatron_smlp.data.errors import DataError
from megatron_smlp.data.indexed import write_index
from megatron_smlp.data.manifest import (
    Manifest,
    PairRecord,
    fingerprint_of,
    sha256_of,
    write_atomically,
)
from megatron_smlp.data.records import Rejection
from megatron_smlp.data.sources import Position

STREAMS = ("bin", "lengths", "sequences")


@dataclass
class Counts:
    """What has been written so far."""

    documents: int = 0
    tokens: int = 0
    empty: int = 0
    text_bytes: int = 0
    """Uncompressed input, bytes."""
    rejected: dict[str, int] = field(default_factory=dict)
    """By reason."""

    @property
    def num_rejected(self) -> int:
        return sum(self.rejected.values())


@dataclass
class Journal:
    """The last commit."""

    settings: str
    """Digest of everything that decides the bytes; a resumed run must have the same."""
    position: Position = field(default_factory=Position)
    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes of each growing file."""
    max_ids: list[int] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)

    @classmethod
    def read(cls, path: Path) -> "Journal":
        body = json.loads(path.read_text(encoding="utf-8"))
        body["position"] = Position(**body["position"])
        body["counts"] = Counts(**body["counts"])
        return cls(**body)


class PartialOutput:
    """Use as a context manager; it holds the folder's lock and its open files."""

    def __init__(
        self, prefix: str, *, keys: tuple[str, ...], level: str, dtype: np.dtype[Any]
    ) -> None:
        self.prefix, self.keys, self.level, self.dtype = prefix, keys, level, dtype
        self.folder = Path(prefix + ".partial")
        self.files: dict[str, BinaryIO] = {}
        self.digests: list[Any] = []
        self.journal = Journal(settings="")

    def __enter__(self) -> "PartialOutput":
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.folder.mkdir(exist_ok=True)
        self.lock = (self.folder / "lock").open("wb")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.lock.close()
            raise DataError(
                f"another process is writing {self.prefix!r} (it holds {self.folder}/lock); wait "
                f"for it, or give another --output-prefix"
            ) from None
        return self

    def __exit__(self, *error: object) -> None:
        for stream in self.files.values():
            stream.close()
        self.lock.close()

    def start(self, settings: str, *, resume: bool) -> Position:
        """Open the files, at the last commit if `resume`; the place in the input to go on from.

        Raises:
            DataError: the folder was left by a run with other settings or inputs.
        """
        journal_path = self.folder / "journal.json"
        self.journal = Journal(settings, max_ids=[-1] * len(self.keys))
        if resume and journal_path.is_file():
            self.journal = Journal.read(journal_path)
            if self.journal.settings != settings:
                raise DataError(
                    f"--resume: {self.folder} was left by a run with other flags or other input "
                    f"files; give the same ones, or leave out --resume to start again"
                )
        for name in self._file_names():
            self._open_at_commit(name)
        self.digests = [self._digest_of_committed(number) for number in range(len(self.keys))]
        return self.journal.position

    def _file_names(self) -> list[str]:
        pairs = [f"{number}.{stream}" for number in range(len(self.keys)) for stream in STREAMS]
        return [*pairs, "rejected.jsonl"]

    def _open_at_commit(self, name: str) -> None:
        stream = (self.folder / name).open("ab")
        committed = self.journal.sizes.get(name, 0)
        if stream.tell() < committed:
            raise DataError(f"--resume: {self.folder / name} is shorter than its journal says")
        stream.truncate(committed)
        self.files[name] = stream

    def _digest_of_committed(self, number: int) -> Any:
        with (self.folder / f"{number}.bin").open("rb") as stream:
            return hashlib.file_digest(stream, "sha256")

    def write(self, encoded: EncodedChunk) -> None:
        """Append the documents and the rejections of one chunk."""
        for number, part in enumerate(encoded.keys):
            self._write_key(number, part)
        for rejection in encoded.rejections:
            self._write_rejection(rejection)
        counts = self.journal.counts
        counts.documents += encoded.num_documents
        counts.empty += encoded.num_empty
        counts.tokens += sum(len(part.ids) for part in encoded.keys)

    def _write_key(self, number: int, part: EncodedKey) -> None:
        ids = part.ids.tobytes()
        self.digests[number].update(ids)
        self.files[f"{number}.bin"].write(ids)
        self.files[f"{number}.lengths"].write(part.lengths.astype("<i4").tobytes())
        self.files[f"{number}.sequences"].write(part.sequences.astype("<i4").tobytes())
        self.journal.max_ids[number] = max(self.journal.max_ids[number], part.max_id)

    def _write_rejection(self, rejection: Rejection) -> None:
        line = json.dumps(asdict(rejection), ensure_ascii=True) + "\n"
        self.files["rejected.jsonl"].write(line.encode())
        rejected = self.journal.counts.rejected
        rejected[rejection.reason] = rejected.get(rejection.reason, 0) + 1

    def commit(self, position: Position) -> None:
        """Make what is written so far survive a crash, as everything before `position`."""
        for name, stream in self.files.items():
            stream.flush()
            os.fsync(stream.fileno())
            self.journal.sizes[name] = stream.tell()
        self.journal.position = position
        write_atomically(self.folder / "journal.json", json.dumps(asdict(self.journal)))

    def pair_name(self, key: str) -> str:
        return f"{Path(self.prefix).name}_{key}_{self.level}"

    def finish(self) -> dict[str, PairRecord]:
        """Write the indices; the records of the pairs for the manifest, by name."""
        return {
            self.pair_name(key): self._finish_pair(number, key)
            for number, key in enumerate(self.keys)
        }

    def _finish_pair(self, number: int, key: str) -> PairRecord:
        data, index = self.folder / f"{number}.bin", self.folder / f"{number}.idx"
        lengths = _read_flat(self.folder / f"{number}.lengths")
        sequences = _read_flat(self.folder / f"{number}.sequences")
        write_index(index, dtype=self.dtype, lengths=lengths, sequences_per_document=sequences)
        return PairRecord(
            key=key,
            level=self.level,
            dtype=self.dtype.name,
            documents=len(sequences),
            sequences=len(lengths),
            tokens=data.stat().st_size // self.dtype.itemsize,
            max_id=self.journal.max_ids[number],
            bin_bytes=data.stat().st_size,
            idx_bytes=index.stat().st_size,
            bin_sha256=self.digests[number].hexdigest(),
            idx_sha256=sha256_of(index),
            fingerprint=fingerprint_of(data, index),
        )

    def publish(self, manifest: Manifest) -> None:
        """Move everything to its final name; `.idx` last of a pair, the manifest last of all.

        Files of an older run go first: a crash in between must not leave a mixed pair.
        """
        final = Path(self.prefix)
        manifest_path = final.with_name(final.name + ".json")
        rejected_path = final.with_name(final.name + ".rejected.jsonl")
        pairs = [str(final.with_name(self.pair_name(key))) for key in self.keys]
        for old in (manifest_path, rejected_path, *(Path(pair + ".idx") for pair in pairs)):
            old.unlink(missing_ok=True)
        for number, pair in enumerate(pairs):
            (self.folder / f"{number}.bin").replace(pair + ".bin")
            (self.folder / f"{number}.idx").replace(pair + ".idx")
        if self.journal.counts.rejected:
            (self.folder / "rejected.jsonl").replace(rejected_path)
        manifest.write(manifest_path)
        self.discard()

    def discard(self) -> None:
        """Leave nothing behind."""
        shutil.rmtree(self.folder)


def _read_flat(path: Path) -> np.ndarray[Any, np.dtype[np.int32]]:
    if path.stat().st_size == 0:
        return np.empty(0, dtype="<i4")
    return np.memmap(path, dtype="<i4", mode="r")
