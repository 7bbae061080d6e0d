"""Every validation of a run, and of runs with other seeds, reads the same samples; how many."""

import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.in_process import MINIMAL, pretrained
from support.launches import launch, records

from megatron_smlp.data.pairs.indexed import bin_path, idx_path, write_index
from megatron_smlp.platform.one_process import one_process
from megatron_smlp.training.data import run_datasets

SCHEDULED = re.sub("--(micro-batch-size|global-batch-size|train-iters) [0-9]+", "", MINIMAL)
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


def test_more_pairs_than_the_limit_of_open_files(tmp_path: Path):
    pairs = [random_pair(tmp_path / str(number), documents=40) for number in range(20)]
    data = f"--data-path {' '.join(pairs)} --split 90,10,0 --data-cache-path {tmp_path / 'cache'}"
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_open = len(list(Path("/dev/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (num_open + 100, before[1]))
    try:
        with pretrained(RUN, base=MINIMAL.replace("--mock-data", data)):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("order", ["single", "cyclic"])
def test_validations_of_one_run_and_of_its_continuation(tmp_path: Path, order: str):
    """The weights stay fixed, so that the loss depends on the samples only."""
    flags = f"{RUN} --save {tmp_path} --dataloader-type {order}"
    with pretrained(f"{flags} --train-iters 6"):
        first = validations(tmp_path)
    assert len(first) == 3
    with pretrained(f"{flags} --train-iters 10"):
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
    """Also by a complete run, which would otherwise have nothing left to do, and where parameters
    of a training would be gathered ahead."""
    flags = f"--architecture gmlp --eval-iters 2 --log-interval 1 --train-iters 3 --save {tmp_path}"
    flags += " --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
    with pretrained(f"{flags} --lr 1e-1 --save-interval 2"):
        pass
    before = records(tmp_path)
    with pretrained(f"{flags} --skip-train"):
        pass
    added = records(tmp_path)[len(before) :]
    assert not any("loss" in line for line in added)
    trained, again = (
        [line for line in lines if "validation_loss" in line] for lines in (before, added)
    )
    assert [line["iteration"] for line in (*trained, *again)] == [3, 3]
    losses = [line["validation_loss"] for line in (*trained, *again)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    whole = records(tmp_path)
    with pretrained(f"{flags} --skip-train --ckpt-step 2"):
        pass
    assert records(tmp_path) == whole, "steps behind an earlier checkpoint stay"


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


@pytest.mark.parametrize("flag", ["--data-path", "--data-args-path"])
def test_a_split_that_nobody_reads_may_be_empty(
    parse: Callable[..., Any], tmp_path: Path, flag: str
):
    """The default split leaves none of 30 documents to test. Megatron has it for one flag only."""
    prefix = random_pair(tmp_path / "data", documents=30)
    (tmp_path / "names").write_text(prefix)
    data = f"{flag} {prefix if flag == '--data-path' else tmp_path / 'names'}"
    args = parse("--architecture gmlp --eval-iters 0", base=MINIMAL.replace("--mock-data", data))
    args.iteration = 0
    with one_process():
        found = run_datasets(args, lambda line: None)
    assert len(found.train) >= 8
    assert (found.valid, found.test) == ([None], None)


@pytest.mark.parametrize(
    ("how", "named"),
    [("--full-validation", True), ("--eval-iters 2", False), ("--eval-iters 0", True)],
)
def test_each_of_several_validation_sets_has_its_own_numbers(tmp_path: Path, how: str, named: bool):
    """Read whole, or some batches of each. The first set has two ids, the second 99."""
    train, narrow, wide = (
        random_pair(tmp_path / name, documents=documents, vocab_size=vocab_size)
        for name, documents, vocab_size in (("train", 300, 2), ("a", 10, 2), ("b", 10, 99))
    )
    names = ("books", "web") if named else ("0", "1")
    flags = (
        f"--architecture gmlp --token-router base --num-experts 4 --lr 3e-2 "
        f"--train-iters 6 --train-data-path {train} --valid-data-path {narrow} {wide} "
        f"{how} --multiple-validation-sets --eval-micro-batch-size 1 "
        f"--log-dir {tmp_path} "
    )
    flags += "--validation-set-names books web" if named else ""
    with pretrained(flags, base=MINIMAL.replace("--mock-data", "")):
        pass
    lines = [line for line in records(tmp_path) if "loss" not in line]
    if how == "--eval-iters 0":
        assert not lines
        return
    assert [line["iteration"] for line in lines] == [6, 6]
    fields = [f"validation_{name}" for name in names]
    for line, field, other in zip(lines, fields, reversed(fields), strict=True):
        assert {f"{field}_loss", f"{field}_routers"} <= set(line)
        assert not any(name.startswith(other) for name in line)
    assert lines[0][f"{fields[0]}_loss"] + 1 < lines[1][f"{fields[1]}_loss"]
    read = 13 * 16 if how == "--full-validation" else 2 * 2 * 16
    counts = {router["choices"] for line, field in zip(lines, fields, strict=True)
              for router in line[f"{field}_routers"]}  # fmt: skip
    assert counts == {read}, "each token once"


def test_a_whole_validation_beside_a_share_for_tests(tmp_path: Path):
    """Nothing of the test share is read without --eval-iters."""
    prefix = random_pair(tmp_path / "data", documents=100)
    base = MINIMAL.replace("--mock-data", f"--data-path {prefix} --split 80,15,5")
    flags = "--architecture gmlp --full-validation --multiple-validation-sets --eval-iters 0"
    with pretrained(f"{flags} --log-dir {tmp_path}", base=base):
        pass
    assert "validation_0_loss" in records(tmp_path)[-1]


def test_a_schedule_of_batches_reads_mixed_data_to_its_end(tmp_path: Path):
    """The last batch reads past --train-samples: 1, 4, then 7."""
    one, other = (random_pair(tmp_path / name, documents=30) for name in ("a", "b"))
    base = SCHEDULED.replace("--mock-data", f"--data-path 0.5 {one} 0.5 {other} --split 1,0,0")
    flags = "--architecture gmlp --micro-batch-size 1 --train-samples 5 --eval-iters 0"
    flags += " --step-batch-size-schedule 0:1,16:3 --log-interval 1"
    flags += f" --save {tmp_path}"
    for _ in range(2):  # the second run has nothing left to read
        with pretrained(flags, base=base):
            pass
    assert [line["consumed_samples"] for line in records(tmp_path)] == [1, 4, 7]


def test_another_schedule_at_a_resume_ends_with_the_samples(tmp_path: Path):
    """Its steps are counted from the resumed position, not from the first sample."""
    flags = "--architecture gmlp --micro-batch-size 1 --train-samples 8 --eval-iters 0"
    base = SCHEDULED
    flags += f" --log-interval 1 --save {tmp_path} --step-batch-size-schedule"
    with pretrained(f"{flags} 0:1 --exit-interval 4", base=base):
        pass
    with pretrained(f"{flags} 0:2", base=base):
        pass
    assert [line["consumed_samples"] for line in records(tmp_path)] == [1, 2, 3, 4, 6, 8]


def test_a_whole_validation_is_the_same_over_ranks(tmp_path: Path):
    """Also for sets with an odd number of samples, or with fewer samples than ranks."""
    train, small, odd = (
        random_pair(tmp_path / name, documents=documents)
        for name, documents in (("train", 300), ("small", 1), ("odd", 4))
    )
    flags = (
        f"--architecture gmlp --token-router base --num-experts 2 --lr 0 --train-iters 1 "
        f"--train-data-path {train} --valid-data-path {small} {odd} --micro-batch-size 1 "
        f"--full-validation --multiple-validation-sets --eval-iters 0 --log-dir {tmp_path}/"
    )
    base = MINIMAL.replace("--mock-data", "").replace("--micro-batch-size 2", "")
    with pretrained(f"{flags}1", base=base):
        pass
    launch({"2": f"{base} {flags}2"}, processes=2, folder=tmp_path)
    one, two = (
        {name: value for line in records(tmp_path / count) for name, value in line.items()
         if name.startswith("validation") and name.endswith("loss")}
        for count in ("1", "2")
    )  # fmt: skip
    assert len(one) == 2
    assert two == pytest.approx(one, rel=1e-5)


def test_a_set_that_was_not_evaluated_at_the_end_is_evaluated_by_the_same_command(tmp_path: Path):
    """Also if another set's name begins with its own."""
    train, valid = (random_pair(tmp_path / name, documents=30) for name in ("train", "valid"))
    names = ("en_web", "en")
    flags = (
        f"--architecture gmlp --lr 0 --train-data-path {train} --valid-data-path {valid} {valid} "
        f"--multiple-validation-sets --validation-set-names {' '.join(names)} --save {tmp_path}"
    )
    base = MINIMAL.replace("--mock-data", "")
    with pretrained(flags, base=base):
        pass
    file = tmp_path / "metrics.jsonl"
    *before, last = file.read_text().splitlines(keepends=True)
    assert "validation_en_loss" in last
    file.write_text("".join(before))
    with pretrained(flags, base=base):
        pass
    assert "validation_en_loss" in records(tmp_path)[-1]
