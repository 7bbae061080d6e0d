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
from megatron_smlp.training.data import run_datasets

RUN = "--architecture gmlp --lr 0 --eval-interval 2 --eval-iters 2 --log-interval 1"


def validations(folder: Path) -> list[float]:
    return [line["validation_loss"] for line in records(folder) if "validation_loss" in line]


def random_pair(path: Path, *, documents: int, vocab_size: int = 99) -> str:
    lengths = np.full(documents, 21, dtype=np.int32)
    ids = np.random.default_rng(0).integers(0, vocab_size, size=lengths.sum(), dtype=np.uint16)
    ids.tofile(bin_path(str(path)))
    write_index(
        idx_path(str(path)),
        dtype=ids.dtype,
        lengths=lengths,
        sequences_per_document=np.ones(documents, dtype=np.int32),
    )
    return str(path)


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
    later = f"{RUN} --dataloader-type {order} --train-iters 7 --start-eval-at-iter 4"
    with pretrained(f"{later} --log-dir {tmp_path / 'later'}"):
        pass
    found = [line for line in records(tmp_path / "later") if "validation_loss" in line]
    assert [line["iteration"] for line in found] == [4, 6, 7]
    assert [line["validation_loss"] for line in found] == pytest.approx([first[0]] * 3, rel=1e-6)


def test_a_checkpoint_is_evaluated_without_training(tmp_path: Path):
    """Also by a run that is complete, which would otherwise have nothing left to do."""
    words = f"--architecture gmlp --eval-iters 2 --log-interval 1 --train-iters 3 --save {tmp_path}"
    with pretrained(f"{words} --lr 1e-1"):
        pass
    before = records(tmp_path)
    with pretrained(f"{words} --skip-train"):
        pass
    added = records(tmp_path)[len(before) :]
    assert not any("loss" in line for line in added)
    trained, again = (
        [line for line in lines if "validation_loss" in line] for lines in (before, added)
    )
    assert [line["iteration"] for line in (*trained, *again)] == [3, 3]
    losses = [line["validation_loss"] for line in (*trained, *again)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_other_seeds_train_on_others_and_validate_on_the_same(
    parse: Callable[..., Any], tmp_path: Path
):
    prefix = random_pair(tmp_path / "data", documents=300)
    base = MINIMAL.replace("--mock-data", f"--data-path {prefix} --split 80,15,5")

    def samples(seed: int) -> list[list[Any]]:
        args = parse(f"--architecture gmlp --seed {seed} --eval-iters 2", base=base)
        args.iteration = 0
        found = run_datasets(args, lambda line: None)
        parts = (found.train, found.valid[0], found.test)
        return [[part[i]["tokens"].tolist() for i in range(4)] for part in parts]

    with one_process():
        one, other = samples(1), samples(2)
    assert one[0] != other[0]
    assert one[1:] == other[1:]


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("how", ["--full-validation", "--eval-iters 2"])
def test_each_of_several_validation_sets_has_its_own_numbers(tmp_path: Path, named: bool, how: str):
    """Whole, or some batches of each. The first set has two ids, the second 99."""
    train, narrow, wide = (
        random_pair(tmp_path / name, documents=documents, vocab_size=vocab_size)
        for name, documents, vocab_size in (("train", 300, 2), ("a", 10, 2), ("b", 10, 99))
    )
    names = ("books", "web") if named else ("0", "1")
    words = (
        f"--architecture gmlp --token-router base --num-experts 4 --lr 3e-2 "
        f"--train-iters 6 --train-data-path {train} --valid-data-path {narrow} {wide} "
        f"{how} --multiple-validation-sets --eval-micro-batch-size 1 "
        f"--log-dir {tmp_path} "
    )
    words += "--validation-set-names books web" if named else ""
    with pretrained(words, base=MINIMAL.replace("--mock-data", "")):
        pass
    lines = [line for line in records(tmp_path) if "loss" not in line]
    assert [line["iteration"] for line in lines] == [6, 6]
    fields = [f"validation_{name}" for name in names]
    for line, field, other in zip(lines, fields, reversed(fields), strict=True):
        assert {f"{field}_loss", f"{field}_routers"} <= set(line)
        assert not any(name.startswith(other) for name in line)
    assert lines[0][f"{fields[0]}_loss"] + 1 < lines[1][f"{fields[1]}_loss"]
