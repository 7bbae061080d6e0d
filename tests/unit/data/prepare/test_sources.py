"""Every input format gives the same documents, and a position to resume from."""

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import BYTE_FLAGS, COMPRESSORS, Run, make_documents, write_jsonl

from megatron_smlp.data.pairs.indexed import open_index
from megatron_smlp.data.prepare.chunks import START, Position
from megatron_smlp.data.prepare.inputs import comparable_size, find_inputs
from megatron_smlp.data.prepare.records import Rejection, parse_chunk
from megatron_smlp.data.prepare.sources import read_chunks
from megatron_smlp.errors import DataError

DOCUMENTS = make_documents(400, seed=3)


def _jsonl(path: Path) -> Path:
    return write_jsonl(path, DOCUMENTS)


def _packed(path: Path, suffix: str, *, members: int = 1) -> Path:
    lines = _jsonl(path.with_suffix(".tmp")).read_bytes().splitlines(keepends=True)
    step = -(-len(lines) // members)
    parts = [b"".join(lines[at : at + step]) for at in range(0, len(lines), step)]
    path.write_bytes(b"".join(map(COMPRESSORS[suffix], parts)))
    return path


def _array(path: Path, **layout: Any) -> Path:
    records = [{"text": text, "n": [1, {"a": "]}"}]} for text in DOCUMENTS]
    encoding = "utf-8-sig" if layout else "utf-8"
    path.write_text(json.dumps(records, **layout), encoding=encoding)
    return path


def _parquet(path: Path) -> Path:
    columns = {"n": list(range(len(DOCUMENTS))), "text": DOCUMENTS}
    return _write_parquet(path, columns, row_group_size=150)


def _write_parquet(path: Path, columns: Any, **layout: Any) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table(columns) if isinstance(columns, dict) else columns
    parquet.write_table(table, path, **layout)
    return path


FORMATS: dict[str, Callable[[Path], Path]] = {
    "a.jsonl": _jsonl,
    "a.json": _jsonl,
    "no_suffix": _jsonl,
    "several_members.jsonl.gz": lambda path: _packed(path, ".gz", members=7),
    "a.json.bz2": lambda path: _packed(path, ".bz2", members=2),
    "a.jsonl.xz": lambda path: _packed(path, ".xz", members=2),
    "a.jsonl.zst": lambda path: _packed(path, ".zst", members=3),
    "array.json": _array,
    "indented.json": lambda path: _array(path, indent=1, ensure_ascii=False),
    "a.parquet": _parquet,
}


@pytest.fixture(params=FORMATS)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return FORMATS[request.param](tmp_path / request.param)


def _records(files: list[Path], start: Position = START) -> list[tuple[int, str]]:
    records = []
    for chunk in read_chunks(files, keys=("text",), start=start):
        for record in parse_chunk(chunk, ("text",)):
            assert not isinstance(record, Rejection), record
            records.append((record[0], record[1][0]))
    return records


def _texts(files: list[Path], start: Position = START) -> list[str]:
    return [text for _, text in _records(files, start)]


def test_every_format_gives_the_same_documents(source: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("megatron_smlp.data.prepare.sources.CHUNK_BYTES", 5000)
    monkeypatch.setattr("megatron_smlp.data.prepare.compression.BLOCK_BYTES", 777)
    monkeypatch.setattr("megatron_smlp.data.prepare.compression.COMPRESSED_BLOCK_BYTES", 333)
    assert _records([source]) == list(enumerate(DOCUMENTS, start=1))


def test_reading_goes_on_from_the_end_of_every_chunk(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("megatron_smlp.data.prepare.sources.CHUNK_BYTES", 20_000)
    monkeypatch.setattr("megatron_smlp.data.prepare.sources.PARQUET_ROWS", 64)
    monkeypatch.setattr("megatron_smlp.data.prepare.compression.BLOCK_BYTES", 4096)
    monkeypatch.setattr("megatron_smlp.data.prepare.compression.COMPRESSED_BLOCK_BYTES", 1024)
    other = write_jsonl(tmp_path / "other.jsonl", ["one more"])
    files = [other, source, other]
    everything = ["one more", *DOCUMENTS, "one more"]
    chunks = list(read_chunks(files, keys=("text",)))
    assert len(chunks) > 4
    done = 0
    for chunk in chunks:
        done += len(list(parse_chunk(chunk, ("text",))))
        assert _texts(files, chunk.end) == everything[done:]


def test_folders_and_globs_are_sorted_and_searched(tmp_path: Path):
    names = ["a.json.gz", "b.jsonl", "sub/c.jsonl.zst", "sub/d.parquet"]
    (tmp_path / "sub").mkdir()
    for name in (*names, "notes.txt", ".h.jsonl"):
        (tmp_path / name).touch()
    assert find_inputs([str(tmp_path)]) == [tmp_path / name for name in names]
    found = find_inputs([f"{tmp_path}/*.jsonl", f"{tmp_path}/notes.txt"])
    assert found == [tmp_path / "b.jsonl", tmp_path / "notes.txt"]


def test_output_in_the_folder_of_the_corpus_is_no_input(run: Run, tmp_path: Path):
    _jsonl(tmp_path / "a.jsonl")
    (tmp_path / "bad.jsonl").write_text("bad")
    flags = [*BYTE_FLAGS, "--on-error", "skip"]
    first = run(tmp_path, tmp_path / "data", *flags)
    assert first.counts.num_rejected == 1
    (tmp_path / "data.partial").mkdir()
    (tmp_path / "data.partial" / "rejected.jsonl").write_text("bad")
    assert run(tmp_path, tmp_path / "data", *flags).counts == first.counts
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "rejected.jsonl").write_text("bad")
    found = [tmp_path / name for name in ("a.jsonl", "bad.jsonl")]
    assert find_inputs([f"{tmp_path}/**/*.json*"]) == found


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ('[{"text": "a"}, {"text": "b"}', "delimiter"),
        ('[{"text": "a"}, {"text": }]', "Expecting value"),
        ('[{"n": ' + "9" * 5000 + "}]", "digits"),
        ('[{"text": "a"}, ' + "[" * 100_000, "recursion"),
        ('[{"text": "a"}] [{"text": "b"}]', "Extra data"),
    ],
)
def test_a_damaged_array_has_no_records(tmp_path: Path, body: str, why: str):
    path = tmp_path / "array.json"
    path.write_text(body)
    (chunk,) = read_chunks([path], keys=("text",))
    assert not chunk.payload
    assert chunk.damage is not None
    assert "bad JSON in the array" in chunk.damage
    assert why in chunk.damage


def test_rows_of_a_parquet_file_are_cut_by_their_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Otherwise one chunk of 1,024 long documents, for one worker, would fill the read-ahead."""
    monkeypatch.setattr("megatron_smlp.data.prepare.sources.CHUNK_BYTES", 20_000)
    texts = [f"{number:04} " * 200 for number in range(500)] + ["x" * 50_000, "", "y"]
    path = _write_parquet(tmp_path / "a.parquet", {"text": texts})
    chunks = list(read_chunks([path], keys=("text",)))
    assert len(chunks) > 25
    assert sorted(chunk.num_bytes for chunk in chunks)[-2] <= 25_000
    assert [chunk.first_line for chunk in chunks[1:]] == [c.end.line + 1 for c in chunks[:-1]]
    assert _texts([path]) == texts


def test_long_documents_of_a_parquet_file_are_read_as_they_are_needed(tmp_path: Path):
    """20 MB in one row group of under 1,024 rows, in pages of 4 rows."""
    pyarrow = pytest.importorskip("pyarrow")
    texts = [f"{number:05}" * 20_000 for number in range(200)]
    path = _write_parquet(tmp_path / "a.parquet", {"text": texts}, write_batch_size=4)
    before = pyarrow.total_allocated_bytes()
    most = max(pyarrow.total_allocated_bytes() for _ in read_chunks([path], keys=("text",)))
    assert most - before < 8_000_000


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("null", r"a\.parquet:2: .*\[null_text\]"),
        ("no column", "--json-keys text: .* has no such column"),
        ("JSON lines", r"a\.parquet:1: not a readable parquet file"),
    ],
)
def test_a_parquet_file_that_is_refused(run: Run, tmp_path: Path, kind: str, message: str):
    columns: dict[str, Any] = {
        "null": {"text": ["a", None]},
        "no column": {"body": ["a"]},
    }
    path = _jsonl(tmp_path / "a.parquet")
    if kind in columns:
        _write_parquet(path, columns[kind])
    with pytest.raises(DataError, match=message):
        run(path, tmp_path / "data", *BYTE_FLAGS)


def test_a_zstd_file_with_the_largest_window(tmp_path: Path):
    zstandard = pytest.importorskip("zstandard")
    path = _jsonl(tmp_path / "a.jsonl")
    settings = zstandard.ZstdCompressionParameters.from_level(1, window_log=31)
    packed = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    data = packed.compress(path.read_bytes()) + packed.flush()
    path.with_suffix(".jsonl.zst").write_bytes(data)
    assert _texts([path.with_suffix(".jsonl.zst")]) == DOCUMENTS


def test_a_folder_is_read_through_links_and_without_what_is_no_corpus(tmp_path: Path):
    corpus, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    (corpus / ".cache").mkdir(parents=True)
    elsewhere.mkdir()
    for path in (corpus / "a.jsonl", elsewhere / "b.jsonl", corpus / ".cache" / "meta.json"):
        path.write_text('{"text": "a"}\n')
    (corpus / "linked").symlink_to(elsewhere)
    assert find_inputs([str(corpus)]) == [corpus / "a.jsonl", corpus / "linked" / "b.jsonl"]


def test_a_file_that_is_named_again_is_read_once(tmp_path: Path):
    for name in ("b.jsonl", "c.jsonl"):
        (tmp_path / name).write_text('{"text": "a"}\n')
    (tmp_path / "a.jsonl").symlink_to("b.jsonl")
    files = find_inputs([str(tmp_path), f"{tmp_path}/*.jsonl"])
    assert files == [tmp_path / "a.jsonl", tmp_path / "c.jsonl"]
    assert comparable_size(files) == 28


def test_several_keys_stay_aligned(run: Run, tmp_path: Path):
    path = tmp_path / "two.jsonl"
    rows = [("t1", "b1"), ("", "b2"), ("", ""), ("t4", ""), ("t5", "b5")]
    path.write_text("".join(json.dumps({"t": t, "b": b}) + "\n" for t, b in rows))
    flags = [*BYTE_FLAGS, "--append-eod", "--json-keys", "t", "b"]
    summary = run(path, tmp_path / "data", *flags)
    assert (summary.counts.documents, summary.counts.empty) == (4, 1)
    titles = open_index(str(tmp_path / "data_t_document"))
    bodies = open_index(str(tmp_path / "data_b_document"))
    assert titles.documents.tolist() == [0, 1, 1, 2, 3]
    assert bodies.documents.tolist() == [0, 1, 2, 2, 3]
    assert bytes(titles.tokens.astype(np.uint8)) == b"t1\0t4\0t5\0"


def test_a_pipe_is_read_once(tmp_path: Path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    body = _jsonl(tmp_path / "a.jsonl").read_bytes()
    writer = threading.Thread(target=pipe.write_bytes, args=(body,), daemon=True)
    writer.start()
    assert _texts([pipe]) == DOCUMENTS
    writer.join(60)
    assert not writer.is_alive()
