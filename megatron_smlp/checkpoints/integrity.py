"""Checksums of a checkpoint: written when it is saved, verified before it is loaded.

`checksums.b2` has a line for every file in coreutils' format, and `complete.b2`, the marker, has
one for `checksums.b2`; so `b2sum -c complete.b2 checksums.b2` also verifies them. The marker is
written last. The hash is BLAKE2b with 256 bits; it detects accidents, not tampering.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from megatron_smlp.checkpoints.folders import MARKER, SUMS, is_ours
from megatron_smlp.durable import write_durably

DIGEST_BYTES = 32
THREADS = 4  # per process; hashlib releases the GIL while it computes
OWN_FILES = re.compile(r"__(\d+)_\d+\.distcp")
SHARE = ".checksums-{rank}"

Sums = Mapping[str, str]


def file_sum(path: Path, *, sync: bool = False) -> str:
    """Return the checksum of one file, in hexadecimal; with `sync`, fsync the file as well."""
    with path.open("rb", buffering=0) as file:
        digest = hashlib.file_digest(file, partial(hashlib.blake2b, digest_size=DIGEST_BYTES))
        if sync:
            os.fsync(file.fileno())
    return digest.hexdigest()


def sums_of(paths: Iterable[Path]) -> dict[str, str]:
    """Return checksums by file name; read several files at a time, and fsync each."""
    paths = list(paths)
    with ThreadPoolExecutor(THREADS) as pool:
        sums = pool.map(partial(file_sum, sync=True), paths)
        return {path.name: digest for path, digest in zip(paths, sums, strict=True)}


def format_sums(sums: Sums) -> str:
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))


def parse_sums(text: str) -> dict[str, str]:
    """Return checksums by file name, from what `format_sums` wrote."""
    return {name: digest for digest, name in (line.split("  ", 1) for line in text.splitlines())}


def write_share(folder: Path, *, rank: int) -> None:
    """Compute the checksums of the shards that this rank wrote, and leave them for `seal`."""
    shards = [
        p for p in folder.iterdir() if (m := OWN_FILES.fullmatch(p.name)) and int(m[1]) == rank
    ]
    if shards:
        write_durably(folder / SHARE.format(rank=rank), format_sums(sums_of(shards)))


def seal(folder: Path) -> None:
    """Write checksums and marker: collect the ranks' shares, and compute those of other files."""
    sums: dict[str, str] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for part in pool.map(_taken, sorted(folder.glob(SHARE.format(rank="*")))):
            sums |= part
    rest = (path for path in folder.iterdir() if path.name not in sums and path.is_file())
    sums |= sums_of(rest)
    write_durably(folder / SUMS, format_sums(sums))
    write_durably(folder / MARKER, format_sums({SUMS: file_sum(folder / SUMS)}))


def _taken(share: Path) -> dict[str, str]:
    text = share.read_text(encoding="utf-8")
    share.unlink()
    return parse_sums(text)


def read_sums(folder: Path) -> tuple[dict[str, str], list[str]]:
    """Return the checksums of one of our checkpoints, and the problems of its checksum files."""
    for name in (SUMS, MARKER):
        if not (folder / name).exists():
            return {}, [f"{name} is missing"]
    try:
        if (folder / MARKER).read_bytes() == format_sums({SUMS: file_sum(folder / SUMS)}).encode():
            return parse_sums((folder / SUMS).read_text(encoding="utf-8")), []
    except OSError as error:
        return {}, [f"{SUMS} or {MARKER} cannot be read ({error.strerror})"]
    return {}, [f"{SUMS} or {MARKER} is damaged"]


def problems_in(folder: Path, sums: Sums) -> list[str]:
    """Compare files with their checksums; return their problems, one sentence each."""
    with ThreadPoolExecutor(THREADS) as pool:
        texts = pool.map(lambda item: _problem(folder / item[0], item[1]), sums.items())
        return [text for text in texts if text]


def _problem(path: Path, expected: str) -> str | None:
    try:
        is_same = file_sum(path) == expected
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    return None if is_same else f"{path.name} is not what was written"


def plan(folder: Path) -> tuple[Sums, list[str]]:
    """Return the checksums to compare, and the problems found without comparing any.

    A checkpoint without checksums, such as Megatron's own, must have its index files.
    """
    if not folder.is_dir():
        return {}, ["the folder is missing"]
    if is_ours(folder):
        return read_sums(folder)
    index = ("metadata.json", ".metadata")
    return {}, [f"{name} is missing" for name in index if not (folder / name).exists()]


def verify(folder: Path) -> list[str]:
    """Return a checkpoint's problems, one sentence each; an intact one has none."""
    sums, problems = plan(folder)
    return problems or problems_in(folder, sums)


def read_record(folder: Path, name: str) -> dict[str, Any] | None:
    """Return the object in a JSON file; None if it is missing or does not match its checksum."""
    sums, problems = plan(folder)
    if problems or not (folder / name).exists():
        return None
    if problems_in(folder, {name: sums[name]} if name in sums else {}):
        return None
    return dict(json.loads((folder / name).read_text(encoding="utf-8")))
