"""tools/build_hash_table.py: counts of real datasets, the balance that it reports, bad input."""

import json
from pathlib import Path

import numpy as np
import pytest
from data_helpers import BYTE_FLAGS, Run, write_pair

from megatron_smlp.data import hash_table_cli
from megatron_smlp.data.blending import parse_blend
from megatron_smlp.data.token_counts import counts_of_datasets, token_counts
from megatron_smlp.errors import DataError
from megatron_smlp.routers.hash_table import read_table

NUMBERS = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "10"]


@pytest.mark.parametrize("parts", [1, 3, 20])
def test_ranks_count_parts_of_the_whole(run: Run, tmp_path: Path, parts: int):
    """Without weights only a sum is kept."""
    prefix = write_pair(run, tmp_path, "data", ["1 2 2", "3 2 9"], NUMBERS)
    blend = parse_blend([prefix, prefix], source="x")
    shares = [
        counts_of_datasets(blend, vocab_size=11, part=part, parts=parts) for part in range(parts)
    ]
    whole = token_counts(blend, vocab_size=11)
    assert whole.tolist() == [0, 2, 6, 2, 0, 0, 0, 0, 0, 2, 0]
    assert sum(shares).tolist() == [whole.tolist()]


def test_weights_count_as_in_the_mixture(run: Run, tmp_path: Path):
    ones = write_pair(run, tmp_path, "ones", ["1 1 1 1"], NUMBERS)
    twos = write_pair(run, tmp_path, "twos", ["2 2 2 2 2 2 2 2"], NUMBERS)
    blend = parse_blend(["0.75", ones, "0.25", twos], source="x")
    counts = token_counts(blend, vocab_size=11)
    assert counts[1] == 3 * counts[2] > 0


def test_the_tool(run: Run, documents: list[str], tmp_path: Path, capsys):
    prefix = write_pair(run, tmp_path, "data", documents, [*BYTE_FLAGS, "--append-eod"])
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


def test_an_id_outside_of_the_vocabulary(run: Run, tmp_path: Path):
    prefix = write_pair(run, tmp_path, "data", ["1 9"], NUMBERS)
    flags = ["--num-experts", "2", "--vocab-size", "5", "--output", str(tmp_path / "t")]
    with pytest.raises(DataError, match="holds the id 9, outside a vocabulary of 5"):
        hash_table_cli.main(["--data-path", prefix, *flags])


@pytest.mark.parametrize("second", [[*NUMBERS[:3], "20"], [*BYTE_FLAGS, "--vocab-size", "300"]])
def test_datasets_of_several_vocabularies(run: Run, tmp_path: Path, second: list[str]):
    vocabularies = {"a": [*NUMBERS[:3], "300"], "b": second}
    prefixes = [write_pair(run, tmp_path, n, ["1 2"], flags) for n, flags in vocabularies.items()]
    flags = ["--data-path", *prefixes, "--num-experts", "2", "--output", str(tmp_path / "t")]
    with pytest.raises(DataError, match="manifest with the same vocabulary"):
        hash_table_cli.main(flags)
