"""The manifest `PREFIX.json` next to a dataset: what it was made from, and with which tokenizer.

One manifest describes the pairs of one run (one pair per JSON key). It contains no dates and no
durations, so that a resumed run writes the same bytes as an uninterrupted one.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from megatron_smlp.durable import write_durably
from megatron_smlp.errors import DataError

FORMAT = "megatron_smlp.dataset"
VERSION = 1
FINGERPRINT_BYTES = 1 << 20


@dataclass(frozen=True)
class TokenizerRecord:
    """The tokenizer that wrote the ids."""

    type: str
    identity: str | None
    """SHA-256 of the vocabulary (`tokenizers.spec.WithTexts`); None if ids stand for no text."""
    vocab_size: int
    eod: int | None
    append_eod: bool

    def __str__(self) -> str:
        vocabulary = f", vocabulary {self.identity[:12]}" if self.identity else ""
        end = f"eod {self.eod} {'' if self.append_eod else 'not '}appended"
        return f"{self.type}, {self.vocab_size} entries{vocabulary}, {end}"


@dataclass(frozen=True)
class PairRecord:
    """One `.bin`/`.idx` pair; sizes in bytes, checksums in hexadecimal."""

    key: str
    level: str
    dtype: str
    documents: int
    sequences: int
    tokens: int
    max_id: int
    bin_bytes: int
    idx_bytes: int
    bin_sha256: str
    idx_sha256: str
    fingerprint: str
    """SHA-256 of both sizes and of the first and last MiB of both files: quick at any size."""


@dataclass(frozen=True)
class Manifest:
    """The content of a manifest file."""

    tokenizer: TokenizerRecord
    pairs: dict[str, PairRecord]
    """The pairs by name, without folder and suffix."""
    sources: list[dict[str, Any]] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write to `path` atomically: a reader sees the old file or the whole new one."""
        body = {"format": FORMAT, "version": VERSION, **asdict(self)}
        write_durably(path, json.dumps(body, indent=2) + "\n")


class Origin(NamedTuple):
    """A pair's manifest, and the pair's record in it."""

    path: Path
    manifest: Manifest
    pair: PairRecord


def read_manifest(path: Path) -> Manifest:
    """Read a manifest.

    Raises:
        DataError: not JSON, of another version, or incomplete.
    """
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        if body["version"] != VERSION:
            raise ValueError(f"version {body['version']}, expected {VERSION}")
        return Manifest(
            tokenizer=TokenizerRecord(**body["tokenizer"]),
            pairs={name: PairRecord(**pair) for name, pair in body["pairs"].items()},
            sources=body["sources"],
            counts=body["counts"],
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(
            f"{path} is not a readable dataset manifest ({error!r}): delete it"
        ) from None


def find_manifest(prefix: str) -> Origin | None:
    """Return the manifest that lists the pair at `prefix`; None if there is none.

    `P.json` describes `P_text_document`; a key may contain underscores, so every cut is tried.
    """
    pair = Path(prefix)
    stem = pair.name
    while stem:
        path = pair.with_name(stem + ".json")
        if path.is_file() and is_manifest(path):
            manifest = read_manifest(path)
            if pair.name in manifest.pairs:
                return Origin(path, manifest, manifest.pairs[pair.name])
        stem = stem.rpartition("_")[0]
    return None


def check_output_prefix(prefix: str) -> None:
    """Refuse a prefix that does not end in a name, so that its files would be hidden and nameless.

    Raises:
        DataError: it is empty, or names a folder.
    """
    if prefix.rpartition("/")[2] in ("", ".", ".."):
        raise DataError(
            f"--output-prefix {prefix!r} does not end in a file name: add one, "
            f"as {prefix.rstrip('/') or '.'}/NAME"
        )


def check_manifest_path(path: Path, *, pairs: Iterable[str]) -> None:
    """Refuse to overwrite another file with a manifest: `books.json` may be the corpus itself.

    Args:
        pairs: the names of the pairs that it will describe.

    Raises:
        DataError: the file exists and is no manifest, or it describes other pairs that exist.
    """
    if not path.exists():
        return
    if not (path.is_file() and is_manifest(path)):
        raise DataError(
            f"{path} exists and is not a dataset manifest; give another "
            f"--output-prefix, or move the file"
        )
    for name in set(read_manifest(path).pairs) - set(pairs):
        if path.with_name(name + ".bin").exists():
            raise DataError(
                f"{path} describes {name} and would be replaced, losing the record of "
                f"how that was made; give another --output-prefix, or delete {name}.bin"
            )


def is_unchanged(prefix: str, pair: PairRecord) -> bool:
    """Return whether both files exist and have the record's fingerprint."""
    files = [Path(f"{prefix}.{suffix}") for suffix in ("bin", "idx")]
    return all(path.is_file() for path in files) and fingerprint_of(*files) == pair.fingerprint


def is_manifest(path: Path) -> bool:
    """Return True for a manifest: only manifests name the format at the start of the file."""
    with path.open("rb") as stream:
        return FORMAT.encode() in stream.read(200)


def sha256_of(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint_of(*paths: Path) -> str:
    """Return the SHA-256 over the size, first MiB and last MiB of each file."""
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with path.open("rb") as stream:
            digest.update(stream.read(FINGERPRINT_BYTES))
            stream.seek(max(0, size - FINGERPRINT_BYTES))
            digest.update(stream.read(FINGERPRINT_BYTES))
    return digest.hexdigest()
