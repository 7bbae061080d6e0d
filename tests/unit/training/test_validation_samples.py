"""Every validation of a run reads the same samples, and so do runs of other seeds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.in_process import MINIMAL, pretrained
from support.launches import records

from megatron_smlp.data.pairs.indexed import bin_path, idx_path, write_index
from megatron_smlp.platform.one_process import one_process
from megatron_smlp.training.data import DatasetProvider

RUN = "--architecture gmlp --lr 0 --eval-interval 2 --eval-iters 2 --log-interval 1"


def validations(folder: Path) -> list[float]:
    return [line["validation_loss"] for line in records(folder) if "validation_loss" in line]


@pytest.mark.parametrize("order", ["single", "cyclic"])
def test_validations_of_one_run_and_of_its_continuation(tmp_path: Path, order: str):
    """The weights stand still, so that the loss is a function of the samples."""
    words = f"{RUN} --save {tmp_path} --dataloader-type {order}"
    with pretrained(f"{words} --train-iters 6"):
        first = validations(tmp_path)
    assert len(first) == 3
    with pretrained(f"{words} --train-iters 10"):
        every = validations(tmp_path)
    assert len(every) == 5
    losses = [line["loss"] for line in records(tmp_path) if "loss" in line]
    assert len(set(losses)) == len(losses), "training goes on to other samples"
    assert every == pytest.approx([first[0]] * 5, rel=1e-6)


def test_other_seeds_train_on_others_and_validate_on_the_same(
    parse: Callable[..., Any], tmp_path: Path
):
    lengths = np.full(300, 21, dtype=np.int32)
    ids = np.random.default_rng(0).integers(0, 99, size=lengths.sum(), dtype=np.uint16)
    prefix = str(tmp_path / "data")
    ids.tofile(bin_path(prefix))
    write_index(
        idx_path(prefix),
        dtype=ids.dtype,
        lengths=lengths,
        sequences_per_document=np.ones(len(lengths), dtype=np.int32),
    )
    base = MINIMAL.replace("--mock-data", f"--data-path {prefix} --split 80,15,5")

    def samples(seed: int) -> list[list[Any]]:
        parse(f"--architecture gmlp --seed {seed}", base=base)
        datasets = DatasetProvider(lambda line: None)([24, 12, 4])
        return [[part[i]["tokens"].tolist() for i in range(4)] for part in datasets]

    with one_process():
        one, other = samples(1), samples(2)
    assert one[0] != other[0]
    assert one[1:] == other[1:]


@pytest.mark.parametrize("first", ["greedy", "prices"])
def test_base_is_evaluated_both_ways_on_the_same_samples(tmp_path: Path, first: str):
    """Validation and test; the second pass is what a run of the other --base-eval reports."""
    other = {"greedy": "prices", "prices": "greedy"}[first]
    words = (
        "--architecture gmlp --token-router base --num-experts 4 --lr 1e-2 --train-iters 4 "
        "--eval-interval 2 --eval-iters 2"
    )
    for name, flags in (("both", f"{first} --base-eval-both"), ("one", other)):
        with pretrained(f"{words} --log-dir {tmp_path / name} --base-eval {flags}"):
            pass
    both, one = (records(tmp_path / name) for name in ("both", "one"))
    assert len(both) == len(one)
    for title in ("validation", "test"):
        pairs = [pair for pair in zip(both, one, strict=True) if f"{title}_loss" in pair[0]]
        assert pairs
        for left, right in pairs:
            assert left[f"{title}_{other}_loss"] == right[f"{title}_loss"]
            assert left[f"{title}_{other}_routers"] == right[f"{title}_routers"]
            assert left[f"{title}_routers"] != right[f"{title}_routers"]
            assert left[f"{title}_loss"] != right[f"{title}_loss"]
