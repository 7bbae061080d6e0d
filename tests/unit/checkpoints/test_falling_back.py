"""A run that finds damaged checkpoints says so, and ends bitwise like the undisturbed run."""

import re
import time
from argparse import Namespace
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import assert_ends_like, flip_a_bit, pretrain
from support.conversions import run as converted
from support.launches import launch_calls

from megatron_smlp.checkpoints.folders import (
    MARKER,
    MODEL,
    RELEASE,
    RUN,
    SUMS,
    TRACKER,
    iteration_folder,
    iterations,
    tracked_iteration,
)
from megatron_smlp.conversion import convert
from megatron_smlp.errors import NoGoodCheckpointError, UsageError


def cut_shard(run: Path) -> str:
    shard = iteration_folder(run, 6) / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-100])
    return r"iter_0000006 is damaged \(__0_0\.distcp is not what was written\)"


def flipped_index_and_more(run: Path) -> str:
    flip_a_bit(iteration_folder(run, 6) / ".metadata")
    (iteration_folder(run, 4) / MARKER).unlink()
    (run / TRACKER).write_bytes(b"\xff\x00")
    return r"iter_0000004 is damaged \(complete\.b2 is missing\)"


@pytest.mark.parametrize("spoil", [cut_shard, flipped_index_and_more])
def test_the_newest_good_one_is_loaded(
    run: Path, finished_run: Path, capfd: pytest.CaptureFixture[str], spoil: Callable[[Path], str]
):
    expected = spoil(run)
    (run / ".iter_0000006.partial-12ab").mkdir()
    pretrain(f"--save {run}")
    output = capfd.readouterr().out
    assert re.search(rf"WARNING: .*{expected}: not loaded", output), output
    good = 2 if "0000004" in expected else 4
    assert f"WARNING: resuming from {iteration_folder(run, good)} instead" in output
    assert f"resumed from iteration {good} of" in output
    assert "removed .iter_0000006.partial-12ab" in output
    assert_ends_like(run, finished_run)
    assert iterations(run) == [2, 4, 6]


def test_strict_load_refuses(run: Path):
    expected = cut_shard(run)
    with pytest.raises(NoGoodCheckpointError, match=rf"{expected}.*without --strict-load"):
        pretrain(f"--save {run} --strict-load")
    assert tracked_iteration(run) == 6


def test_a_step_that_is_asked_for_is_not_replaced_by_another(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    cut_shard(run)
    with pytest.raises(NoGoodCheckpointError, match="--ckpt-step 6 selects it"):
        pretrain(f"--load {run} --ckpt-step 6")
    with pytest.raises(NoGoodCheckpointError, match=r"iter_0000003 is damaged \(the folder"):
        pretrain(f"--load {run} --ckpt-step 3")
    capfd.readouterr()
    pretrain(f"--load {run} --ckpt-step 2 --save {tmp_path / 'other'} --exit-interval 4")
    output = capfd.readouterr().out
    assert "resumed from iteration 2 of" in output
    assert "WARNING" not in output
    assert iterations(tmp_path / "other") == [4]


def test_nothing_good_is_never_a_silent_new_start(run: Path):
    for iteration in (2, 4, 6):
        flip_a_bit(iteration_folder(run, iteration) / "__0_0.distcp")
    with pytest.raises(NoGoodCheckpointError) as caught:
        pretrain(f"--save {run}")
    assert all(f"iter_000000{n} is damaged" in str(caught.value) for n in (2, 4, 6))
    assert "--no-resume" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_of_another_folder_and_of_megatron(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    """--finetune falls back too, leaves --load untouched, and accepts one without checksums."""
    flip_a_bit(iteration_folder(run, 6) / "__0_0.distcp")
    for name in (SUMS, MARKER, RUN, MODEL):
        (iteration_folder(run, 4) / name).unlink()
    before = sorted(path.name for path in run.iterdir())
    pretrain(f"--load {run} --finetune --save {tmp_path / 'tuned'} --exit-interval 2")
    output = capfd.readouterr().out
    assert f"{iteration_folder(run, 4)} has no checksums" in output
    assert f"WARNING: {iteration_folder(run, 4)} has no model.json: it was not written by" in output
    assert sorted(path.name for path in run.iterdir()) == before
    assert tracked_iteration(run) == 6
    assert iterations(tmp_path / "tuned") == [2]


def test_weights_alone_are_verified_and_not_overlooked(finished_run: Path, tmp_path: Path):
    weights = tmp_path / "weights"
    changes = {"drop_optimizer": True, "checks": False}
    converted(convert.torch_dist_to_torch_dist, finished_run, weights, **changes)
    (weights / TRACKER).write_text("")
    with pytest.raises(UsageError, match=r"release holds weights that latest_.* does not name"):
        pretrain(f"--load {weights} --save {weights}")
    (weights / TRACKER).write_text(RELEASE)
    flip_a_bit(weights / RELEASE / "__0_0.distcp")
    with pytest.raises(NoGoodCheckpointError, match=r"release is damaged .*: restore one, give"):
        pretrain(f"--load {weights} --save {tmp_path / 'more'}")


@pytest.mark.slow
def test_ranks_wait_for_a_slow_file_system(run: Path, tmp_path: Path):
    """For longer than a collective's timeout: the first rank plans, another verifies its share."""
    flip_a_bit(iteration_folder(run, 6) / "__0_0.distcp")
    launch_calls(_read_slowly, str(run), processes=2, log=tmp_path / "log")


def _read_slowly(run: str) -> None:
    import torch

    from megatron_smlp.checkpoints import choosing, integrity

    torch.distributed.init_process_group("gloo")
    torch.distributed.barrier()
    torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=1))
    name = ("plan", "problems_in")[torch.distributed.get_rank()]
    quick = getattr(integrity, name)

    def slow(*args: Any) -> Any:
        time.sleep(2)
        return quick(*args)

    setattr(integrity, name, slow)
    folders = [iteration_folder(run, n) for n in (6, 4)]
    args = Namespace(strict_load=False, ckpt_step=None)
    assert choosing._first_good(args, folders, print) == folders[1]
