"""checkpoints/save_lease.py: a run that was taken over by another saves nothing more."""

import os
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from support.checkpoints import RUN
from support.deletion import hidden_in
from support.in_process import pretrained

from megatron_smlp.checkpoints import save_lease, saving
from megatron_smlp.checkpoints.folders import iterations, tidy, tracked_iteration
from megatron_smlp.checkpoints.save_lease import SaveLease
from megatron_smlp.errors import TakenOverError, UsageError
from megatron_smlp.lease import Holder, Lease


def acquired(folder: Path) -> SaveLease:
    lease = save_lease_of(folder)
    lease._acquire(folder)
    return lease


def save_lease_of(folder: Path) -> SaveLease:
    return SaveLease(Namespace(save=str(folder), rank=0, distributed_timeout_minutes=1), print)


def take_over(folder: Path) -> None:
    """Take the folder over, as a run does that found the previous one silent."""
    (folder / ".lease-000002").write_bytes(Holder.here(expiry=60.0).content())


def test_a_run_that_was_killed_has_failed(tmp_path: Path):
    process = os.fork()
    if not process:
        killed = acquired(tmp_path)
        killed.reached(3)
        assert killed.lease is not None
        killed.lease.beat()
        os._exit(9)
    os.waitpid(process, 0)
    before = acquired(tmp_path).before
    assert before is not None
    assert (before.iteration, before.failed) == (3, True)


def test_a_second_writer_is_refused_with_the_name_of_the_first(tmp_path: Path):
    first = acquired(tmp_path)
    with pytest.raises(UsageError, match=f"is being written by process {os.getpid()} on "):
        save_lease_of(tmp_path)._acquire(tmp_path)
    first.fence()


def test_a_run_that_is_taken_over_saves_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """After its second step: what it had saved stays, and the tracker does not go back."""
    run = tmp_path / "run"
    reached = SaveLease.reached

    def taken_over(self: SaveLease, iteration: int) -> None:
        reached(self, iteration)
        if iteration == 3:
            take_over(run)

    monkeypatch.setattr(SaveLease, "reached", taken_over)
    with (
        pytest.raises(TakenOverError, match=r"by attempt 2 \(process .* it can no longer save"),
        pretrained(f"{RUN} --save {run} --on-save-failure continue"),
    ):
        pass
    assert iterations(run) == [2]
    assert tracked_iteration(run) == 2


@pytest.mark.parametrize("how", ["", "--async-save"])
def test_one_that_is_taken_over_while_it_writes_says_so(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
):
    """The error is not about a shard's folder, which the new owner removed; and nothing is left of
    the save that is still in the background then."""
    run = tmp_path / "run"
    prepare, write = FileSystemWriterAsync.prepare_write_data, saving.write_and_add_share

    def write_late(*args: Any) -> None:
        time.sleep(0.5)  # the run is at its next saves by then
        write(*args)

    monkeypatch.setattr(saving, "write_and_add_share", write_late)

    def taken_over(*args: Any) -> None:
        prepare(*args)
        if not (run / ".lease-000002").exists():
            take_over(run)
            assert len(tidy(run)) == 1

    monkeypatch.setattr(FileSystemWriterAsync, "prepare_write_data", taken_over)
    with (
        pytest.raises(TakenOverError, match="it can no longer save"),
        pretrained(f"{RUN} --save {run} {how}"),
    ):
        pass
    assert iterations(run) == []
    assert tracked_iteration(run) is None
    assert not hidden_in(run)


def test_folders_that_are_not_one_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Another machine does not see the lease."""
    monkeypatch.setattr(save_lease, "SHARING", 0.1)
    acquire = save_lease.acquire

    def unseen(folder: Path, **options: Any) -> Lease:
        lease = acquire(folder, **options)
        lease.path.rename(folder / "elsewhere")
        return lease

    monkeypatch.setattr(save_lease, "acquire", unseen)
    with (
        pytest.raises(UsageError, match=r"is not the same folder as on .*all machines share"),
        pretrained(f"{RUN} --save {tmp_path / 'run'}"),
    ):
        pass
