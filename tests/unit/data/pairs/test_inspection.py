"""`inspect_dataset` on good pairs, and fuzzed pairs through everything that reads them."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_helpers import BYTE_FLAGS, make_documents, write_jsonl

from megatron_smlp.data.pairs import inspect_cli, merge_cli
from megatron_smlp.data.pairs.combining import merge
from megatron_smlp.data.pairs.full_check import validate
from megatron_smlp.data.pairs.indexed import open_index
from megatron_smlp.data.pairs.quick_check import verify_for_training
from megatron_smlp.data.prepare.preprocessing import Summary
from megatron_smlp.errors import DataError, UsageError

Run = Callable[..., Summary]


@pytest.fixture
def prefix(run: Run, tmp_path: Path) -> str:
    source = write_jsonl(tmp_path / "a.jsonl", make_documents(60))
    run(source, tmp_path / "data", *BYTE_FLAGS, "--append-eod")
    return str(tmp_path / "data_text_document")


def test_show(prefix: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_cli.main(["show", prefix + ".bin"]) == 0
    shown = capsys.readouterr().out
    assert "documents        60\n" in shown
    assert "ByteLevelTokenizer, 512 entries, eod 0" in shown


def test_validate_is_silent_about_good_data(
    prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inspect_cli.main(["validate", prefix]) == 0
    assert "FAILED" not in capsys.readouterr().out
    assert inspect_cli.main(["validate", prefix, "--vocab-size", "200"]) == 1
    assert "outside of 0 to 199" in capsys.readouterr().out


def test_sample_decodes(prefix: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--documents", "0", "59", "--max-tokens", "1000", *BYTE_FLAGS]
    assert inspect_cli.main(["sample", prefix, *flags]) == 0
    documents = make_documents(60)
    shown = capsys.readouterr().out
    assert documents[0].rstrip() in shown.replace("\0", "")
    assert documents[59].rstrip() in shown.replace("\0", "")
    with pytest.raises(UsageError, match="there are 0 to 59"):
        inspect_cli.main(["sample", prefix, "--documents", "60"])


def test_sample_says_that_the_vocabulary_is_another(
    prefix: str, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer_folder)]
    assert inspect_cli.main(["sample", prefix, *flags]) == 0
    assert "was written with another vocabulary (a ByteLevelTokenizer" in capsys.readouterr().err


def test_stats(prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "lengths.png"
    flags = ["--seq-length", "100"]
    if pytest.importorskip("matplotlib"):
        flags += ["--png", str(picture)]
    assert inspect_cli.main(["stats", prefix, *flags]) == 0
    index = open_index(prefix)
    shown = capsys.readouterr().out
    assert f"60 documents, {index.num_tokens:,} tokens" in shown
    assert f"{(index.num_tokens - 1) // 100:,} samples of 100 tokens" in shown
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_split_and_merge_give_the_pair_back(prefix: str, tmp_path: Path) -> None:
    flags = ["--weights", "0.5", "0.3", "0.2", "--output-prefix", str(tmp_path / "part")]
    assert inspect_cli.main(["split", prefix, *flags]) == 0
    parts = [str(tmp_path / f"part_{name}") for name in ("train", "valid", "test")]
    merge_cli.main(["--input", *parts, "--output-prefix", str(tmp_path / "again")])
    assert (tmp_path / "again.bin").read_bytes() == Path(prefix + ".bin").read_bytes()
    with pytest.raises(DataError, match=r"part_train.bin is there already; give --overwrite"):
        inspect_cli.main(["split", prefix, *flags])
    merging = ["--input", *parts, "--output-prefix", str(tmp_path / "again")]
    with pytest.raises(DataError, match=r"again.bin is there already; give --overwrite"):
        merge_cli.main(merging)
    assert inspect_cli.main(["split", prefix, *flags, "--overwrite"]) == 0
    merge_cli.main([*merging, "--overwrite"])
    assert (tmp_path / "again.idx").read_bytes() == Path(prefix + ".idx").read_bytes()
    fewer = ["--weights", "0.5", "0.5", *flags[4:], "--overwrite"]
    with pytest.raises(DataError, match=r"leaves out test, but .*part_test\.idx is there, of anot"):
        inspect_cli.main(["split", prefix, *fewer])


def _damage(rng: random.Random, prefix: str) -> str:
    """Change one of the files in one way; the way."""
    path = Path(prefix + rng.choice([".bin", ".idx", ".idx"]))
    data = bytearray(path.read_bytes())
    way = rng.choice(["flip", "flip", "flip", "cut", "grow", "zero", "swap", "repeat"])
    at, size = rng.randrange(len(data)), rng.randint(1, 64)
    if way == "flip":
        data[at] ^= 1 << rng.randrange(8)
    elif way == "cut":
        del data[at:]
    elif way == "grow":
        data += rng.randbytes(size)
    elif way == "zero":
        data[at : at + size] = bytes(len(data[at : at + size]))
    elif way == "swap":
        data[at : at + size] = rng.randbytes(len(data[at : at + size]))
    else:
        data[at:at] = data[at : at + size]
    path.write_bytes(data)
    return f"{path.suffix} {way} {at} {size}"


@pytest.mark.parametrize("with_manifest", [True, False])
def test_fuzzed_pairs_give_an_error_or_the_right_tokens(
    prefix: str, tmp_path: Path, with_manifest: bool
) -> None:
    """With a manifest every change is seen. Without, other tokens or other borders of documents
    may be another good dataset; the borders of sequences never change unseen."""
    files = {suffix: Path(prefix + suffix).read_bytes() for suffix in (".bin", ".idx")}
    if not with_manifest:
        (tmp_path / "data.json").unlink()
    rng = random.Random(7)
    for _ in range(300):
        for suffix, body in files.items():
            Path(prefix + suffix).write_bytes(body)
        way = _damage(rng, prefix)
        changed = any(Path(prefix + suffix).read_bytes() != body for suffix, body in files.items())
        same_sequences = _sequences(Path(prefix + ".idx").read_bytes()) == _sequences(files[".idx"])
        for check in (_verify, _validate, _merge):
            problem = _problem(check, prefix, tmp_path)
            if problem is None:
                assert not changed or not with_manifest, (way, check)
                assert same_sequences, (way, check)
            else:
                assert changed, (way, problem)
                assert "\n" not in problem


@pytest.mark.parametrize(
    ("offset", "number", "what"),
    [
        (34 + 4 * 60 + 8 * 5, -8, "sequence 5"),
        (34 + 12 * 60 + 8 * 5, 10**9, r"document [56] (is|starts at) sequence"),
    ],
)
def test_a_damaged_index_is_neither_shown_nor_cut(
    prefix: str, tmp_path: Path, offset: int, number: int, what: str
) -> None:
    """Of 60 sequences and documents: the start of one in `.bin`, or in the list of sequences."""
    with Path(prefix + ".idx").open("r+b") as stream:
        stream.seek(offset)
        stream.write(number.to_bytes(8, "little", signed=True))
    before = sorted(tmp_path.iterdir())
    for command in (["stats"], ["split"], ["sample", "--documents", "5"]):
        with pytest.raises(DataError, match=rf"\.idx is damaged: {what}"):
            inspect_cli.main([command[0], prefix, *command[1:]])
    assert sorted(tmp_path.iterdir()) == before


def _sequences(index: bytes) -> bytes:
    """Lengths and pointers of an `.idx` of 60 sequences."""
    return index[34 : 34 + 12 * 60]


def _problem(check: Callable[[str, Path], None], prefix: str, tmp_path: Path) -> str | None:
    try:
        check(prefix, tmp_path)
    except DataError as error:
        return str(error)
    return None


def _verify(prefix: str, tmp_path: Path) -> None:
    verify_for_training(prefix, vocab_size=512)


def _validate(prefix: str, tmp_path: Path) -> None:
    for _, problem in validate(prefix, vocab_size=512):
        if problem:
            raise DataError(problem)


def _merge(prefix: str, tmp_path: Path) -> None:
    merge([prefix, prefix], output_prefix=str(tmp_path / "merged"))
    merged = open_index(str(tmp_path / "merged"))
    assert merged.num_documents == 2 * open_index(prefix).num_documents
    np.testing.assert_array_equal(merged.document(0), open_index(prefix).document(0))
