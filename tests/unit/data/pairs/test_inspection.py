"""`inspect_dataset` on good pairs, and fuzzed pairs through everything that reads pairs."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_helpers import BYTE_FLAGS, Run, make_documents, write_pair

from megatron_smlp.data.pairs import inspect_cli, merge_cli
from megatron_smlp.data.pairs.combining import merge
from megatron_smlp.data.pairs.full_check import validate
from megatron_smlp.data.pairs.indexed import open_index
from megatron_smlp.data.pairs.quick_check import verify_for_training
from megatron_smlp.errors import DataError, UsageError


@pytest.fixture
def prefix(run: Run, tmp_path: Path) -> str:
    return write_pair(run, tmp_path, "data", make_documents(60), [*BYTE_FLAGS, "--append-eod"])


def test_show_and_validate(prefix: str, capsys: pytest.CaptureFixture[str]):
    assert inspect_cli.main(["show", prefix + ".bin"]) == 0
    shown = capsys.readouterr().out
    assert "documents        60\n" in shown
    assert "ByteLevelTokenizer, 512 entries, eod 0" in shown
    assert inspect_cli.main(["validate", prefix]) == 0
    assert "FAILED" not in capsys.readouterr().out
    assert inspect_cli.main(["validate", prefix, "--vocab-size", "200"]) == 1
    assert "outside 0 to 199" in capsys.readouterr().out


def test_sample_decodes(prefix: str, capsys: pytest.CaptureFixture[str]):
    flags = ["--documents", "0", "59", "--max-tokens", "1000", *BYTE_FLAGS]
    assert inspect_cli.main(["sample", prefix, *flags]) == 0
    documents = make_documents(60)
    shown = capsys.readouterr().out
    assert documents[0].rstrip() in shown.replace("\0", "")
    assert documents[59].rstrip() in shown.replace("\0", "")
    with pytest.raises(UsageError, match="there are 0 to 59"):
        inspect_cli.main(["sample", prefix, "--documents", "60"])


def test_a_sample_is_text_where_only_the_folder_of_a_tokenizer_is_named(
    run: Run, tmp_path: Path, tokenizer_folder: Path, hf_flags: list[str], capsys
):
    prefix = write_pair(run, tmp_path, "data", ["the white whale"], hf_flags)
    capsys.readouterr()
    inspect_cli.main(["sample", prefix, "--tokenizer-model", str(tokenizer_folder)])
    shown = capsys.readouterr()
    assert "the white whale" in shown.out
    assert not shown.err
    inspect_cli.main(["sample", prefix, *BYTE_FLAGS])
    assert "another tokenizer wrote these ids (HuggingFaceTokenizer, " in capsys.readouterr().err


def test_stats(prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    picture = tmp_path / "lengths.png"
    flags = ["--seq-length", "100", "--png", str(picture)]
    assert inspect_cli.main(["stats", prefix, *flags]) == 0
    index = open_index(prefix)
    shown = capsys.readouterr().out
    assert f"60 documents, {index.num_tokens:,} tokens" in shown
    assert f"{(index.num_tokens - 1) // 100:,} samples of 100 tokens" in shown
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_split_and_merge_give_the_pair_back(prefix: str, tmp_path: Path):
    flags = ["--weights", "0.5", "0.3", "0.2", "--output-prefix", str(tmp_path / "part")]
    assert inspect_cli.main(["split", prefix, *flags]) == 0
    parts = [str(tmp_path / f"part_{name}") for name in ("train", "valid", "test")]
    merge_cli.main(["--input", *parts, "--output-prefix", str(tmp_path / "again")])
    assert (tmp_path / "again.bin").read_bytes() == Path(prefix + ".bin").read_bytes()
    with pytest.raises(DataError, match=r"part_train.bin already exists; give --overwrite"):
        inspect_cli.main(["split", prefix, *flags])
    merging = ["--input", *parts, "--output-prefix", str(tmp_path / "again")]
    with pytest.raises(DataError, match=r"again.bin already exists; give --overwrite"):
        merge_cli.main(merging)
    assert inspect_cli.main(["split", prefix, *flags, "--overwrite"]) == 0
    merge_cli.main([*merging, "--overwrite"])
    assert (tmp_path / "again.idx").read_bytes() == Path(prefix + ".idx").read_bytes()
    fewer = ["--weights", "0.5", "0.5", *flags[4:], "--overwrite"]
    with pytest.raises(DataError, match=r"omits test, but .*part_test\.idx exists from another"):
        inspect_cli.main(["split", prefix, *fewer])


@pytest.mark.parametrize(
    "flags",
    [
        *("sample {} --count -1", "sample {} --max-tokens 0"),
        *(f"split {{}} --weights {shares}" for shares in ("nan", "0 0", "1 -1", "1 1 1 1")),
    ],
)
def test_numbers_that_mean_nothing(prefix: str, tmp_path: Path, flags: str):
    before = sorted(tmp_path.iterdir())
    with pytest.raises((DataError, UsageError), match=flags.split()[2]):
        inspect_cli.main(flags.format(prefix).split())
    assert sorted(tmp_path.iterdir()) == before


def _damage(rng: random.Random, prefix: str) -> str:
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
):
    """With a manifest every change is detected. Without, other tokens or document boundaries may be
    another valid dataset; sequence boundaries never change undetected."""
    files = {suffix: Path(prefix + suffix).read_bytes() for suffix in (".bin", ".idx")}
    if not with_manifest:
        (tmp_path / "data.json").unlink()
    rng = random.Random(7)
    for _ in range(150):
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


def _sequences(index: bytes) -> bytes:
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
