"""A dataset under construction: `PREFIX.partial/`, committed shard by shard, published at the end.

The folder contains the growing files of each key's pair, the rejected records, and a journal of the
position in the input and the size of each file at the last commit. After a crash, a resumed run
truncates the files to these sizes.
"""

import contextlib
import io
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_smlp.data.pairs.manifest import (
    Manifest,
    PairRecord,
    check_manifest_path,
    check_output_prefix,
)
from megatron_smlp.data.pairs.writer import (
    PairWriter,
    append_to,
    flush_to_disk,
    publish,
)
from megatron_smlp.data.prepare.chunks import Position
from megatron_smlp.data.prepare.encoding import EncodedChunk
from megatron_smlp.durable import (
    LOCK,
    link_durably,
    lock_folder,
    naming_errors,
    remove_locked,
    write_durably,
)
from megatron_smlp.errors import DataError


@dataclass
class Counts:
    """The documents and records written so far."""

    documents: int = 0
    tokens: int = 0
    empty: int = 0
    text_bytes: int = 0
    """Bytes of uncompressed input."""
    rejected: dict[str, int] = field(default_factory=dict)
    """Number of rejected records by reason."""

    @property
    def num_rejected(self) -> int:
        return sum(self.rejected.values())

    @property
    def reasons(self) -> str:
        """Return counts by reason, such as `bad_json 2, blank_line 1`."""
        return ", ".join(f"{name} {count:,}" for name, count in sorted(self.rejected.items()))


@dataclass
class Journal:
    """The state at the last commit."""

    settings: str
    """Digest of everything that determines the output; a resumed run must have the same."""
    position: Position = field(default_factory=Position)
    pair_sizes: list[dict[str, int] | None] = field(default_factory=list)
    """Bytes of each stream of each key's pair."""
    max_ids: list[int] = field(default_factory=list)
    rejected_size: int = 0
    """Bytes of the list of rejected records."""
    counts: Counts = field(default_factory=Counts)

    @classmethod
    def read(cls, path: Path) -> "Journal":
        body = json.loads(path.read_text(encoding="utf-8"))
        body["position"] = Position(**body["position"])
        body["counts"] = Counts(**body["counts"])
        return cls(**body)


class PartialOutput:
    """A context manager that holds the folder's lock and its open files."""

    def __init__(
        self, prefix: str, *, pairs: dict[str, str], level: str, dtype: np.dtype[Any]
    ) -> None:
        """Args:
        pairs: the prefix of each key's pair.
        """
        self.prefix, self.pairs, self.level, self.dtype = prefix, pairs, level, dtype
        self.folder = Path(prefix + ".partial")
        self.journal_path = self.folder / "journal.json"
        self.writers: list[PairWriter] = []
        self.rejected: BinaryIO = io.BytesIO()  # until the file is open
        self.journal = Journal(settings="")

    def __enter__(self) -> "PartialOutput":
        check_output_prefix(self.prefix)
        names = [Path(prefix).name for prefix in self.pairs.values()]
        check_manifest_path(Path(self.prefix + ".json"), pairs=names)
        try:
            self.lock = lock_folder(self.folder)
        except BlockingIOError:
            raise DataError(
                f"another process is writing {self.prefix!r} (it holds {self.folder}/{LOCK}); wait "
                "for it, or give another --output-prefix"
            ) from None
        return self

    def __exit__(self, *error: object) -> None:
        self._close_files()
        if self.has_journal:
            self.lock.close()
        else:  # it was published, or nothing was committed
            remove_locked(self.folder, self.lock)

    @property
    def has_journal(self) -> bool:
        """Return whether there is a commit to resume from."""
        return self.journal_path.is_file()

    def _close_files(self) -> None:
        """Close all files but the lock."""
        for writer in self.writers:
            writer.close()
        with contextlib.suppress(OSError):  # As for the writers: it was raised before.
            self.rejected.close()

    def start(self, settings: str, *, resume: bool) -> None:
        """Open the files, at the last commit if `resume`; the journal says where to continue.

        Raises:
            DataError: the folder was left by a run with other settings or inputs.
        """
        num_keys = len(self.pairs)
        self.journal = Journal(settings, pair_sizes=[None] * num_keys, max_ids=[-1] * num_keys)
        if resume and self.has_journal:
            self.journal = Journal.read(self.journal_path)
            if self.journal.settings != settings:
                raise DataError(
                    f"--resume: {self.folder} was left by a run with other flags, tokenizer files "
                    f"or input, or by an older version; give the same ones, or omit --resume "
                    f"to start again"
                )
        else:
            self.journal_path.unlink(missing_ok=True)
        journal, rejected = self.journal, self.folder / "rejected.jsonl"
        self.rejected = append_to(rejected, committed=journal.rejected_size)
        kept = enumerate(zip(journal.pair_sizes, journal.max_ids, strict=True))
        self.writers = [
            PairWriter(self.folder / str(number), dtype=self.dtype, committed=sizes, max_id=max_id)
            for number, (sizes, max_id) in kept
        ]

    def write(self, encoded: EncodedChunk) -> None:
        """Append the documents and the rejections of one chunk."""
        for writer, part in zip(self.writers, encoded.keys, strict=True):
            writer.write(part.ids, lengths=part.lengths, sequences=part.sequences)
        with naming_errors(self.folder / "rejected.jsonl"):
            for rejection in encoded.rejections:
                line = json.dumps(asdict(rejection), ensure_ascii=True) + "\n"
                self.rejected.write(line.encode())
        counts = self.journal.counts
        for rejection in encoded.rejections:
            counts.rejected[rejection.reason] = counts.rejected.get(rejection.reason, 0) + 1
        counts.documents += encoded.num_documents
        counts.empty += encoded.num_empty
        counts.tokens += sum(len(part.ids) for part in encoded.keys)

    def commit(self, position: Position) -> None:
        """Make what is written so far durable, as the output of everything before `position`."""
        journal = self.journal
        journal.pair_sizes = [writer.commit() for writer in self.writers]
        journal.max_ids = [writer.max_id for writer in self.writers]
        with naming_errors(self.folder / "rejected.jsonl"):
            journal.rejected_size = flush_to_disk(self.rejected)
        journal.position = position
        write_durably(self.journal_path, json.dumps(asdict(journal)))

    def finish(self) -> dict[str, PairRecord]:
        """Write the indices; return the records of the pairs for the manifest, by name."""
        return {
            Path(prefix).name: writer.finish(key=key, level=self.level)
            for (key, prefix), writer in zip(self.pairs.items(), self.writers, strict=True)
        }

    def publish(self, manifest: Manifest) -> None:
        """Give everything its final name, which makes it visible. May be repeated."""
        rejected_path = Path(self.prefix + ".rejected.jsonl")
        rejected_path.unlink(missing_ok=True)
        if self.journal.counts.rejected:
            link_durably(self.folder / "rejected.jsonl", rejected_path)
        writers = dict(zip(self.pairs.values(), self.writers, strict=True))
        publish(writers, manifest=manifest, manifest_path=Path(self.prefix + ".json"))
        self.discard()

    def discard(self) -> None:
        """Drop the journal, before its files in case of a crash; `__exit__` drops the rest."""
        self.journal_path.unlink(missing_ok=True)
        self._close_files()
