"""tools/build_hash_table.py: counts of real datasets, the balance that it reports, bad input."""

import gzip
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_helpers import BYTE_FLAGS, ROOT, write_jsonl

from megatron_smlp.data import hash_table_cli
from megatron_smlp.data.blending import parse_blend
from megatron_smlp.data.prepare.preprocessing import Summary
from megatron_smlp.data.token_counts import counts_of_datasets, token_counts
from megatron_smlp.errors import DataError, UsageError
from megatron_smlp.routers.hash_table import read_table

Run = Callable[..., Summary]
NUMBERS = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "10"]
BOOKS = ROOT.parent / "shared" / "data" / "books"


def dataset(run: Run, folder: Path, texts: list[str], *flags: object) -> str:
    run(write_jsonl(folder / "corpus.jsonl", texts), folder / "data", *flags)
    return str(folder / "data_text_document")


def test_counts_by_hand(run: Run, tmp_path: Path):
    prefix = dataset(run, tmp_path, ["1 2 2", "3 2 9"], *NUMBERS)
    counts = token_counts(parse_blend([prefix], source="x"), vocab_size=11)
    assert counts.tolist() == [0, 1, 3, 1, 0, 0, 0, 0, 0, 1, 0]


@pytest.mark.parametrize("parts", [1, 3, 20])
def test_ranks_count_parts_of_the_whole(run: Run, tmp_path: Path, parts: int):
    prefix = dataset(run, tmp_path, ["1 2 2", "3 2 9"], *NUMBERS)
    blend = parse_blend([prefix], source="x")
    shares = [
        counts_of_datasets(blend, vocab_size=11, part=part, parts=parts) for part in range(parts)
    ]
    assert sum(shares).tolist() == [token_counts(blend, vocab_size=11).tolist()]


def test_without_weights_only_a_sum_is_kept(run: Run, tmp_path: Path):
    prefix = dataset(run, tmp_path, ["1 2 2", "3 2 9"], *NUMBERS)
    blend = parse_blend([prefix, prefix], source="x")
    once = counts_of_datasets(parse_blend([prefix], source="x"), vocab_size=11)
    assert counts_of_datasets(blend, vocab_size=11).tolist() == (2 * once).tolist()


def test_weights_count_as_in_the_mixture(run: Run, tmp_path: Path):
    """3 parts of a corpus of ones and 1 part of a twice as large one of twos."""
    for name, text in (("a", "1 1 1 1"), ("b", "2 2 2 2 2 2 2 2")):
        (tmp_path / name).mkdir()
        dataset(run, tmp_path / name, [text], *NUMBERS)
    words = [f"{tmp_path}/a/data_text_document", f"{tmp_path}/b/data_text_document"]
    blend = parse_blend(["0.75", words[0], "0.25", words[1]], source="x")
    counts = token_counts(blend, vocab_size=11)
    assert counts[1] == 3 * counts[2] > 0


def test_the_tool(run: Run, documents: list[str], tmp_path: Path, capsys):
    prefix = dataset(run, tmp_path, documents, *BYTE_FLAGS, "--append-eod")
    output = tmp_path / "table.json"
    flags = ["--data-path", prefix, "--num-experts", "4", "--output", str(output)]
    hash_table_cli.main(flags)
    printed = capsys.readouterr().out
    vocabulary = json.loads(output.read_text())["vocab_size"]
    table = read_table(output, num_experts=4, vocab_size=vocabulary).numpy()
    counts = token_counts(parse_blend([prefix], source="x"), vocab_size=vocabulary)
    loads = np.bincount(table, weights=counts) / counts.sum() * 4
    assert f"{loads.min():.4f} to {loads.max():.4f} of an even share" in printed
    assert loads.max() < 1.01


def test_one_frequent_id_is_said(run: Run, tmp_path: Path, capsys):
    prefix = dataset(run, tmp_path, ["1 1 1 1 1 1 1 2 3"], *NUMBERS)
    output = str(tmp_path / "t.json")
    hash_table_cli.main(["--data-path", prefix, "--num-experts", "2", "--output", output])
    assert "one id is 77.8% of all tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-experts", "0"], "--num-experts 0: give a positive number"),
        (["--num-experts", "2", "--vocab-size", "5"], "holds the id 9, outside a vocabulary of 5"),
    ],
)
def test_bad_input(run: Run, tmp_path: Path, flags: list[str], message: str):
    prefix = dataset(run, tmp_path, ["1 9"], *NUMBERS)
    with pytest.raises((UsageError, DataError), match=message):
        hash_table_cli.main(["--data-path", prefix, "--output", str(tmp_path / "t"), *flags])


@pytest.mark.parametrize("second", [[*NUMBERS[:3], "20"], [*BYTE_FLAGS, "--vocab-size", "300"]])
def test_datasets_of_several_vocabularies(run: Run, tmp_path: Path, second: list[str]):
    """Of other sizes, or of the same and other tokens."""
    for name, flags in (("a", [*NUMBERS[:3], "300"]), ("b", second)):
        (tmp_path / name).mkdir()
        dataset(run, tmp_path / name, ["1 2"], *flags)
    prefixes = [f"{tmp_path}/{name}/data_text_document" for name in "ab"]
    flags = ["--data-path", *prefixes, "--num-experts", "2", "--output", str(tmp_path / "t")]
    with pytest.raises(DataError, match="several vocabularies"):
        hash_table_cli.main(flags)


@pytest.mark.skipif(not BOOKS.exists(), reason="the real corpus is not here")
def test_balance_on_a_real_corpus(run: Run, tmp_path: Path):
    """English books: 8 experts, each within 1 % of an even share."""
    with gzip.open(BOOKS / "valid.jsonl.gz", "rt", encoding="utf-8") as stream:
        texts = [json.loads(line)["text"][:200_000] for line in itertools.islice(stream, 5)]
    vocabulary = BOOKS.parent / "gpt2_bpe"
    flags = ["--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", vocabulary / "vocab.json"]
    flags += ["--merge-file", vocabulary / "merges.txt"]
    prefix = dataset(run, tmp_path, texts, *flags)
    output = tmp_path / "t.json"
    hash_table_cli.main(["--data-path", prefix, "--num-experts", "8", "--output", str(output)])
    body = json.loads(output.read_text())
    counts = token_counts(parse_blend([prefix], source="x"), vocab_size=body["vocab_size"])
    loads = np.bincount(body["experts"], weights=counts) / counts.sum() * 8
    assert abs(loads - 1).max() < 0.01
