"""Bad lines of every kind are refused with file:line and reason, or listed and counted."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from data_helpers import BYTE_FLAGS, COMPRESSORS, PYTHON, ROOT, Run, write_jsonl
from support.launches import run_command
from support.living import lives
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_smlp.data.pairs.indexed import open_index
from megatron_smlp.errors import DataError

GOOD = b'{"text": "good"}'

BAD_LINES: list[tuple[str, bytes]] = [
    *(("blank_line", line) for line in (b"", b" \t ", b"\r", b"\xc2\xa0")),
    *(("bad_json", line) for line in (b"{", b"'text'", b'{"text": "open', b'{"text": "a",}')),
    *(("bad_json", line) for line in (b'{"text": "a"} {"text": "b"}', b'{"text": "\\x41"}')),
    *(("bad_json", line) for line in (b'{"text": "tab\tinside"}', b"<doc>xml</doc>", b"\x00\x00")),
    *(("bad_json", line) for line in (b"[" * 100_000, b'{"text": ' + b"9" * 5000 + b"}")),
    *(("invalid_utf8", b'{"text": "%s"}' % text) for text in (b"\xff", b"\xc3", b"\xed\xa0\x80")),
    *(("not_an_object", line) for line in (b"null", b"1", b"true", b'"text"', b'["text"]', b"NaN")),
    *(("missing_key", line) for line in (b"{}", b'{"Text": "a"}')),
    *(("null_text", line) for line in (b'{"text": null}', b'{"text": "a", "text": null}')),
    *(("not_a_string", b'{"text": %s}' % value) for value in (b"1", b"true", b"[]", b"{}", b"NaN")),
    *(("lone_surrogate", b'{"text": "%s"}' % text) for text in (b"a\\udfff", b"\\uD83D \\uDE42")),
]


def test_raise_names_the_line_and_leaves_nothing(run: Run, tmp_path: Path):
    source = tmp_path / "bad.jsonl"
    for reason, line in BAD_LINES:
        source.write_bytes(b"\n".join([GOOD, GOOD, line, GOOD]) + b"\n")
        with pytest.raises(DataError) as caught:
            run(source, tmp_path / "out" / "data", *BYTE_FLAGS)
        message = str(caught.value)
        assert f"{source}:3: " in message, line
        assert f"[{reason}]" in message, (line, message)
        assert list((tmp_path / "out").iterdir()) == [], line


@pytest.mark.parametrize("workers", [1, 2])
def test_skip_keeps_every_good_line_and_lists_the_others(run: Run, tmp_path: Path, workers: int):
    source, prefix = tmp_path / "bad.jsonl", tmp_path / "data"
    lines = [part for _, line in BAD_LINES for part in (GOOD, line)]
    source.write_bytes(b"\n".join(lines))
    summary = run(source, prefix, *BYTE_FLAGS, "--on-error", "skip", "--workers", workers)
    index = open_index(f"{prefix}_text_document")
    assert index.num_documents == summary.counts.documents == len(BAD_LINES)
    assert bytes(index.tokens.astype(np.uint8)) == b"good" * len(BAD_LINES)
    listed = [
        json.loads(line) for line in Path(f"{prefix}.rejected.jsonl").read_text().splitlines()
    ]
    assert [(row["line"], row["reason"]) for row in listed] == [
        (2 * number, reason) for number, (reason, _) in enumerate(BAD_LINES, start=1)
    ]
    assert sum(summary.counts.rejected.values()) == len(BAD_LINES)
    assert json.loads(Path(f"{prefix}.json").read_text())["counts"]["rejected"] == (
        summary.counts.rejected
    )


def test_a_byte_order_mark_at_the_start_is_no_text(run: Run, tmp_path: Path):
    source = tmp_path / "bom.jsonl"
    source.write_bytes(b"\xef\xbb\xbf" + GOOD + b"\r\n" + GOOD)
    assert run(source, tmp_path / "data", *BYTE_FLAGS).counts.documents == 2


def test_no_document_at_all_is_an_error(run: Run, tmp_path: Path):
    source = tmp_path / "nothing.jsonl"
    source.write_bytes(b"")
    with pytest.raises(DataError, match="no document with text in 1 input"):
        run(source, tmp_path / "data", *BYTE_FLAGS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nothing.jsonl"]


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_a_truncated_archive_gives_all_it_has(run: Run, tmp_path: Path, suffix: str):
    rng = np.random.default_rng(0)
    texts = [rng.bytes(300).hex() for _ in range(3000)]
    body = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)
    source = tmp_path / f"cut.jsonl{suffix}"
    packed = COMPRESSORS[suffix](body)
    source.write_bytes(packed[: len(packed) * 2 // 3])
    with pytest.raises(DataError, match=rf"cut\.jsonl{suffix}:\d+: .*truncated.*\[damaged_file\]"):
        run(source, tmp_path / "data", *BYTE_FLAGS)
    good = tmp_path / "good.jsonl"
    good.write_bytes(GOOD + b"\n")
    summary = run([source, good], tmp_path / "data", *BYTE_FLAGS, "--on-error", "skip")
    assert summary.counts.rejected == {"damaged_file": 1}
    index = open_index(str(tmp_path / "data_text_document"))
    whole = index.num_documents - 1
    assert len(texts) // 4 < whole < len(texts)
    expected = "".join(texts[:whole]) + "good"
    assert bytes(index.tokens.astype(np.uint8)).decode() == expected


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_a_damaged_later_member_of_an_archive(run: Run, tmp_path: Path, suffix: str):
    """The file objects of bz2 and lzma silently take it for the end."""
    source = tmp_path / f"two.jsonl{suffix}"
    member = COMPRESSORS[suffix](GOOD + b"\n")
    source.write_bytes(member + bytes([member[0] ^ 1]) + member[1:])
    with pytest.raises(DataError, match=r":2: the \w+ data is damaged.*\[damaged_file\]"):
        run(source, tmp_path / "data", *BYTE_FLAGS)


def test_a_number_outside_of_the_vocabulary(run: Run, tmp_path: Path):
    source = tmp_path / "numbers.jsonl"
    texts = ["1 2 3", "4 x", "5 99", "6", "7  8", "-1"]
    source.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    flags = ["--tokenizer-type", "NullTokenizer", "--vocab-size", 99]
    with pytest.raises(DataError, match=r"numbers\.jsonl:2: .*\[not_encodable\]"):
        run(source, tmp_path / "data", *flags)
    summary = run(source, tmp_path / "data", *flags, "--on-error", "skip", "--append-eod")
    assert summary.counts.rejected == {"not_encodable": 4}
    assert open_index(str(tmp_path / "data_text_document")).tokens.tolist() == [1, 2, 3, 98, 6, 98]


def test_texts_of_a_parquet_file_that_are_no_text(run: Run, tmp_path: Path):
    """Arrow does not check them; each costs its own record, not the rest of the file."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = pyarrow.array([b"good", b"\xff", b"better", None], pyarrow.binary())
    for kind in ("string", "binary"):
        folder = tmp_path / kind
        folder.mkdir()
        column = texts.view(pyarrow.string()) if kind == "string" else texts
        parquet.write_table(pyarrow.table({"text": column}), folder / "a.parquet")
        flags = (folder / "a.parquet", folder / "data", *BYTE_FLAGS)
        with pytest.raises(DataError, match=r"a\.parquet:2: .*\[invalid_utf8\]"):
            run(*flags)
        counts = run(*flags, "--on-error", "skip").counts
        assert counts.rejected == {"invalid_utf8": 1, "null_text": 1}
        tokens = open_index(str(folder / "data_text_document")).tokens
        assert bytes(tokens.tolist()) == b"goodbetter"


def test_a_tokenizer_without_an_unknown_token(run: Run, tmp_path: Path):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "end": 2}))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "tokenizer"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="end").save_pretrained(folder)
    source = write_jsonl(tmp_path / "a.jsonl", ["a b", "c", "b"])
    flags = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", folder]
    with pytest.raises(DataError, match=r"a\.jsonl:2: .*\[not_encodable\]"):
        run(source, tmp_path / "data", *flags)
    run(source, tmp_path / "data", *flags, "--on-error", "skip")
    assert open_index(str(tmp_path / "data_text_document")).tokens.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        # Like the out-of-memory killer.
        ("os.kill(os.getpid(), signal.SIGKILL)", r"died near \S+:1 \(signal SIGKILL, most likely"),
        ("os._exit(7)", r"died near \S+:1 \(exit code 7\)"),
        ("raise BaseException('panic')", r"failed near \S+:1: BaseException: panic"),
    ],
)
def test_a_worker_that_cannot_go_on_ends_the_run(
    tmp_path: Path, corpus: Path, fault: str, message: str
):
    program = f"""
import os, signal, sys
sys.path[:0] = [{str(ROOT)!r}]
from megatron_smlp.program import run_tool
from megatron_smlp.data.prepare.preprocess_cli import main
from megatron_smlp.data.tokenizers.bytes_and_numbers import ByteLevel

def fail(self, texts):
    {fault}

ByteLevel.encode_batch = fail
if __name__ == "__main__":
    run_tool(main)
"""
    script = tmp_path / "fails.py"
    script.write_text(program)
    command = [PYTHON, str(script), "--input", str(corpus), "--output-prefix"]
    command += [str(tmp_path / "data"), *BYTE_FLAGS, "--workers", "2"]
    [said] = run_command(command, code=1, seconds=60).stderr.strip().splitlines()
    assert re.search(f"error: a worker process {message}", said)


def test_workers_end_when_the_parent_is_killed(tmp_path: Path):
    source = tmp_path / "long.fifo"
    os.mkfifo(source)
    flags = ["--input", source, "--output-prefix", tmp_path / "data", *BYTE_FLAGS, "--workers", 2]
    command = [PYTHON, str(ROOT / "tools/preprocess_data.py"), *map(str, flags)]
    parent = subprocess.Popen(command, start_new_session=True)
    with source.open("wb", buffering=0) as stream:  # Opens once the tool reads and has its workers.
        stream.write(GOOD)
        assert len(_living_of(parent.pid)) > 2
        parent.kill()
        parent.wait()
    deadline = time.monotonic() + 30
    while left := _living_of(parent.pid):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def _living_of(session: int) -> list[int]:
    living = []
    for process in psutil.pids():
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(process) == session and lives(process):
                living.append(process)
    return living


def test_a_tokenizer_whose_ids_have_gaps(run: Run, tmp_path: Path, tokenizer_folder: Path):
    """Otherwise training would read ids outside its vocabulary."""
    folder = shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")
    rules = json.loads((folder / "tokenizer.json").read_text())
    rules["model"]["vocab"]["X"] = 1000
    (folder / "tokenizer.json").write_text(json.dumps(rules))
    source = write_jsonl(tmp_path / "a.jsonl", ["X"])
    flags = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", folder]
    with pytest.raises(DataError, match="gave id 1000, but has 320 entries: its"):
        run(source, tmp_path / "data", *flags)
