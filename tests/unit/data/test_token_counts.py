"""Counts of the token ids of real datasets."""

from pathlib import Path

import pytest
from data_helpers import Run, write_pair

from megatron_smlp.data.blending import parse_blend
from megatron_smlp.data.token_counts import counts_of_datasets, mixture
from megatron_smlp.errors import DataError

NUMBERS = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "10"]


@pytest.mark.parametrize("parts", [1, 3, 20])
def test_ranks_count_parts_of_the_whole(run: Run, tmp_path: Path, parts: int):
    """Without weights only the sum over datasets is kept."""
    prefix = write_pair(run, tmp_path, "data", ["1 2 2", "3 2 9"], NUMBERS)
    blend = parse_blend([prefix, prefix], source="x")
    shares = [
        counts_of_datasets(blend, vocab_size=11, part=part, parts=parts) for part in range(parts)
    ]
    whole = mixture(blend, counts_of_datasets(blend, vocab_size=11))
    assert whole.tolist() == [0, 2, 6, 2, 0, 0, 0, 0, 0, 2, 0]
    assert sum(shares).tolist() == [whole.tolist()]


def test_weights_count_as_in_the_mixture(run: Run, tmp_path: Path):
    ones = write_pair(run, tmp_path, "ones", ["1 1 1 1"], NUMBERS)
    twos = write_pair(run, tmp_path, "twos", ["2 2 2 2 2 2 2 2"], NUMBERS)
    blend = parse_blend(["0.75", ones, "0.25", twos], source="x")
    counts = mixture(blend, counts_of_datasets(blend, vocab_size=11))
    assert counts[1] == 3 * counts[2] > 0


def test_an_id_outside_of_the_vocabulary(run: Run, tmp_path: Path):
    prefix = write_pair(run, tmp_path, "data", ["1 9"], NUMBERS)
    with pytest.raises(DataError, match="holds the id 9, outside a vocabulary of 5"):
        counts_of_datasets(parse_blend([prefix], source="x"), vocab_size=5)
