"""tools/build_hash_table.py: counts of real datasets, the balance that it reports, bad input."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_helpers import BYTE_FLAGS, write_jsonl

from megatron_smlp.data import hash_table_cli
from megatron_smlp.data.blending import parse_blend
from megatron_smlp.data.prepare.preprocessing import Summary
from megatron_smlp.data.token_counts import counts_of_datasets, token_counts
from megatron_smlp.errors import DataError, UsageError
from megatron_smlp.routers.hash_table import read_table

Run = Callable[..., Summary]
NUMBERS = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "10"]


def dataset(run: Run, folder: Path, texts: list[str], *flags: object) -> str:
    run(write_jsonl(folder / "corpus.jsonl", texts), folder / "data", *flags)
    return str(folder / "data_text_document")


@pytest.mark.parametrize("parts", [1, 3, 20])
def test_ranks_count_parts_of_the_whole(run: Run, tmp_path: Path, parts: int):
    """Without weights only a sum is kept."""
    prefix = dataset(run, tmp_path, ["1 2 2", "3 2 9"], *NUMBERS)
    blend = parse_blend([prefix, prefix], source="x")
    shares = [
        counts_of_datasets(blend, vocab_size=11, part=part, parts=parts) for part in range(parts)
    ]
    whole = token_counts(blend, vocab_size=11)
    assert whole.tolist() == [0, 2, 6, 2, 0, 0, 0, 0, 0, 2, 0]
    assert sum(shares).tolist() == [whole.tolist()]


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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-experts", "0"], "--num-experts 0"),
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
