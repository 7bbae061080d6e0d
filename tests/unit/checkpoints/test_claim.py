"""checkpoints/claim.py: one writer in a folder, whatever dies, freezes or comes back."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from support.checkpoints import RUN, assert_ends_like, pretrain
from support.deletion import hidden_in
from support.in_process import pretrained
from support.launches import REPOSITORY

from megatron_smlp.checkpoints import background, saving
from megatron_smlp.checkpoints import claim as claims
from megatron_smlp.checkpoints.claim import DONE, FAILED, Claim
from megatron_smlp.checkpoints.folders import TRACKER, iterations, tidy, tracked_iteration
from megatron_smlp.checkpoints.saving import Saving
from megatron_smlp.durable import write_durably
from megatron_smlp.errors import TakenOverError, UsageError


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heartbeats come often; a lifetime is what a busy machine may take for one."""
    monkeypatch.setattr(claims, "INTERVAL", 0.05)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """For those that never beat."""
    monkeypatch.setattr(claims, "LIFETIME", 0.5)


def say(text: str) -> None:
    print(text)


def owner(folder: Path) -> dict[str, object]:
    """Return the text of the claim with the highest number."""
    newest = max(folder.glob(".writer-*"))
    return dict(json.loads(newest.read_text(encoding="utf-8")))


def elsewhere(folder: Path, *, beat: int = 0) -> Path:
    """Make the claim that is there one of another machine, whose processes cannot be seen."""
    newest = max(folder.glob(".writer-*"))
    other = {"kernel": "another", "host": "node7", "outcome": "", "beat": beat, "process": 4711}
    newest.write_text(json.dumps(owner(folder) | other), encoding="utf-8")
    return newest


@contextlib.contextmanager
def beside(other: Callable[[], None]) -> Iterator[None]:
    """Run it in a thread that does not outlive the block."""
    thread = threading.Thread(target=other)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def test_attempts_are_counted(tmp_path: Path):
    first = Claim(tmp_path, say)
    assert (first.number, first.before) == (1, None)
    first.iteration = 12
    first.release(DONE)
    second = Claim(tmp_path, say)
    assert second.number == 2
    assert second.before is not None
    assert (second.before.iteration, second.before.failed) == (12, False)
    second.release(FAILED)
    third = Claim(tmp_path, say)
    assert third.before is not None
    assert third.before.failed
    third.release(DONE)
    assert [path.name for path in tmp_path.iterdir()] == [".writer-000003"]


@pytest.mark.usefixtures("quick")
def test_a_second_writer_is_refused_with_the_name_of_the_first(tmp_path: Path):
    first = Claim(tmp_path, say)
    with pytest.raises(UsageError, match=f"is being written by process {os.getpid()} on "):
        Claim(tmp_path, say)
    first.check()
    first.release(DONE)


def test_a_dead_process_of_this_machine_is_not_waited_for(tmp_path: Path):
    code = (
        "import os, sys; from pathlib import Path;"
        "from megatron_smlp.checkpoints.claim import Claim;"
        "Claim(Path(sys.argv[1]), print).iteration = 3; os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=REPOSITORY, check=False)
    began = time.monotonic()
    claim = Claim(tmp_path, say)
    assert time.monotonic() - began < claims.LIFETIME / 2
    assert claim.number == 2
    claim.release(DONE)


@pytest.mark.usefixtures("short")
def test_a_process_number_that_came_again_is_not_the_owner(tmp_path: Path):
    Claim(tmp_path, say).release(DONE)
    newest = max(tmp_path.glob(".writer-*"))
    other = owner(tmp_path) | {"outcome": "", "started": "1"}
    newest.write_text(json.dumps(other), encoding="utf-8")
    assert Claim(tmp_path, say).number == 2


@pytest.mark.usefixtures("short")
def test_a_silent_owner_elsewhere_expires(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    Claim(tmp_path, say).release(DONE)
    elsewhere(tmp_path)
    began = time.monotonic()
    claim = Claim(tmp_path, say)
    assert time.monotonic() - began >= claims.LIFETIME
    assert "was last written by process 4711 on node7: is it still at work?" in (
        capsys.readouterr().out
    )
    claim.release(DONE)


@pytest.mark.usefixtures("quick")
def test_an_owner_elsewhere_that_beats_is_alive_whatever_its_clock_says(tmp_path: Path):
    Claim(tmp_path, say).release(DONE)
    os.utime(elsewhere(tmp_path), (0, 0))

    def beat() -> None:
        time.sleep(0.4)
        os.utime(elsewhere(tmp_path, beat=1), (0, 0))

    with (
        beside(beat),
        pytest.raises(UsageError, match="is being written by process 4711 on node7"),
    ):
        Claim(tmp_path, say)


@pytest.mark.usefixtures("quick")
def test_an_owner_that_is_about_to_end_may_be_waited_for(tmp_path: Path):
    """As the ranks of a run that is started again, which are cut off from it."""
    Claim(tmp_path, say).release(DONE)
    elsewhere(tmp_path)

    def beat_and_end() -> None:
        for beat in (1, 2, 3):
            time.sleep(0.4)
            newest = elsewhere(tmp_path, beat=beat)
        time.sleep(0.4)
        newest.write_text(json.dumps(owner(tmp_path) | {"outcome": FAILED}), encoding="utf-8")

    with beside(beat_and_end):
        claim = Claim(tmp_path, say, patience=60)
    assert claim.number == 2
    claim.release(DONE)


@pytest.mark.usefixtures("quick")
def test_a_claim_that_cannot_be_read_now_is_nobodys_death(tmp_path: Path):
    Claim(tmp_path, say).release(DONE)
    newest = elsewhere(tmp_path)
    text = newest.read_text(encoding="utf-8")
    newest.write_text("", encoding="utf-8")

    def come_back() -> None:
        for beat in (1, 2, 3):
            time.sleep(0.5)
            newest.write_text(text.replace('"beat": 0', f'"beat": {beat}'), encoding="utf-8")

    with (
        beside(come_back),
        pytest.raises(UsageError, match="is being written by process 4711 on node7"),
    ):
        Claim(tmp_path, say)


@pytest.mark.usefixtures("quick")
def test_of_many_that_wait_one_takes_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(claims, "LIFETIME", 5.0)
    Claim(tmp_path, say).release(DONE)
    elsewhere(tmp_path)
    taken: list[Claim] = []
    refused: list[str] = []

    def attempt() -> None:
        try:
            taken.append(Claim(tmp_path, say))
        except UsageError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(taken), len(refused)) == (1, 7)
    taken[0].check()
    taken[0].release(DONE)


@pytest.fixture
def late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Claim]:
    """One that was taken for dead."""
    monkeypatch.setattr(claims, "INTERVAL", 1e6)
    old = Claim(tmp_path, say)
    elsewhere(tmp_path)
    monkeypatch.setattr(claims, "LIFETIME", 0.2)
    new = Claim(tmp_path, say)
    yield old
    new.release(DONE)


def test_one_that_comes_back_is_refused(late: Claim):
    with pytest.raises(TakenOverError, match=r"was taken over by attempt 2 \(process"):
        late.check()
    late.release(DONE)
    assert [path.name for path in late.folder.iterdir()] == [".writer-000002"]


def test_a_frozen_writer_that_has_looked_already_renames_nothing(late: Claim):
    """Frozen between its look at the claim and the rename, which then comes after the cleaning."""
    tracker = late.folder / TRACKER
    tracker.write_text("40", encoding="utf-8")

    def wake_up() -> None:
        assert tidy(late.folder) == []

    with pytest.raises(FileNotFoundError):
        write_durably(tracker, "10", before_rename=wake_up)
    assert tracked_iteration(late.folder) == 40


def test_a_run_that_is_taken_over_saves_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """After its second step: what it had saved stays, and no tracker goes back."""
    run = tmp_path / "run"
    reached = Saving.reached

    def taken_over(self: Saving, iteration: int) -> None:
        reached(self, iteration)
        if iteration == 3:
            assert self.claimed is not None
            assert self.claimed._link(self.claimed.number + 1)

    monkeypatch.setattr(Saving, "reached", taken_over)
    with (
        pytest.raises(TakenOverError, match="nothing is saved by it any more"),
        pretrained(f"{RUN} --save {run} --on-save-failure continue"),
    ):
        pass
    assert iterations(run) == [2]
    assert tracked_iteration(run) == 2


@pytest.mark.parametrize("how", ["", "--async-save"])
def test_one_that_is_taken_over_while_it_writes_says_so(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
):
    """Not that a shard has no folder, which the new owner has removed; nor is anything left of what
    is still in the background then."""
    run = tmp_path / "run"
    prepare, write = FileSystemWriterAsync.prepare_write_data, background.write_and_add_share

    def write_late(*args: Any) -> None:
        time.sleep(1.0)  # the run is at its next saves by then
        write(*args)

    monkeypatch.setattr(background, "write_and_add_share", write_late)

    def taken_over(*args: Any) -> None:
        prepare(*args)
        if not (run / ".writer-000002").exists():
            (run / ".writer-000002").touch()
            assert len(tidy(run)) == 1

    monkeypatch.setattr(FileSystemWriterAsync, "prepare_write_data", taken_over)
    with (
        pytest.raises(TakenOverError, match="nothing is saved by it any more"),
        pretrained(f"{RUN} --save {run} {how}"),
    ):
        pass
    assert iterations(run) == []
    assert tracked_iteration(run) is None
    assert not hidden_in(run)


def test_folders_that_are_not_one_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A claim that another machine does not see."""
    monkeypatch.setattr(saving, "SHARING", 0.1)
    take = Saving._take

    def unseen(self: Saving) -> str:
        answer = take(self)
        assert self.claimed is not None
        self.claimed.path.rename(self.claimed.folder / "elsewhere")
        return answer

    monkeypatch.setattr(Saving, "_take", unseen)
    message = r"is not the folder of that name on .*all machines share"
    with (
        pytest.raises(UsageError, match=message),
        pretrained(f"{RUN} --save {tmp_path / 'run'}"),
    ):
        pass


def test_a_slow_file_system_loses_nothing(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Each rename takes a while; heartbeats come late, and do not stop a run."""
    monkeypatch.setattr(claims, "INTERVAL", 0.01)
    replace: Callable[..., Path] = Path.replace

    def slowly(self: Path, target: Path) -> Path:
        time.sleep(0.2)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", slowly)
    run = tmp_path / "run"
    pretrain(f"--save {run}")
    assert_ends_like(run, finished_run)


@pytest.mark.slow
def test_a_frozen_process_of_this_machine_expires(tmp_path: Path):
    """Stopped, not dead: it is watched for a lifetime, and is refused when it goes on."""
    code = (
        "import sys, time; from pathlib import Path;"
        "from megatron_smlp.checkpoints.claim import Claim;"
        "c = Claim(Path(sys.argv[1]), print); print('held', flush=True);"
        "sys.stdin.readline(); c.check()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    os.kill(process.pid, signal.SIGSTOP)
    try:
        claim = Claim(tmp_path, say)
    finally:
        os.kill(process.pid, signal.SIGCONT)
    _, errors = process.communicate("\n", timeout=60)
    assert "TakenOverError" in errors
    claim.release(DONE)
