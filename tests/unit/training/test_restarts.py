"""What a failure cost (restart_report.py), and which host the others wait for (slow_hosts.py)."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.checkpoints import RUN, pretrain
from support.in_process import pretrained
from support.launches import records

from megatron_smlp.checkpoints.save_lease import SaveLease
from megatron_smlp.errors import UsageError
from megatron_smlp.restart_note import RESTART, note_cause
from megatron_smlp.training import batches, loop, slow_hosts
from megatron_smlp.training.restart_report import BY_HAND
from megatron_smlp.training.slow_hosts import LINES, OwnPart, SlowHosts, _Streak
from megatron_smlp.training.speed import StepClock


def fail_at(iteration: int, flags: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run support/checkpoints.py's training until it crashes at this iteration."""

    def reached(self: SaveLease, done: int) -> None:
        if done == iteration:
            raise RuntimeError("a device is gone")

    with monkeypatch.context() as patched:
        patched.setattr(SaveLease, "reached", reached)
        with pytest.raises(RuntimeError, match="a device is gone"), pretrained(f"{RUN} {flags}"):
            pass


def test_a_failure_and_its_cost_are_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """Saves are every two steps; the run dies after the fifth; the launcher noted the cause."""
    run = tmp_path / "run"
    fail_at(6, f"--save {run}", monkeypatch)
    environment: dict[str, str] = {}
    note_cause("rank 3 on node7 was ended by SIGKILL", environment)
    monkeypatch.setenv(RESTART, environment[RESTART])
    pretrain(f"--save {run}")
    (record,) = [record for record in records(run) if "restart" in record]
    assert record["iteration"] == 4
    assert record["restart"]["cause"] == "rank 3 on node7 was ended by SIGKILL"
    assert record["restart"]["lost_steps"] == 1
    assert 0 < record["restart"]["seconds_down"] < 300
    line = "restarted from iteration 4: rank 3 on node7 was ended by SIGKILL | 1 step lost | "
    assert capfd.readouterr().out.count(line) == 1


def test_neither_a_refusal_nor_an_end_by_itself_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The same command with another --split, say, is not a restart."""
    run = tmp_path / "run"

    def refuse(*_: Any, **__: Any) -> None:
        raise UsageError("--split leaves no token for test")

    with monkeypatch.context() as patched:
        patched.setattr(loop, "build_batches", refuse)
        with pytest.raises(UsageError, match="no token"), pretrained(f"{RUN} --save {run}"):
            pass
    for more in ("--exit-interval 2", ""):
        pretrain(f"--save {run} {more}")
    assert [record for record in records(run) if "restart" in record] == []


def test_one_that_nobody_started_again_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = tmp_path / "run"
    fail_at(3, f"--save {run}", monkeypatch)
    pretrain(f"--save {run}")
    (record,) = [record for record in records(run) if "restart" in record]
    assert (record["iteration"], record["restart"]["cause"]) == (2, BY_HAND)


HOSTS = ["node0", "node0", "node1", "node1"]


def test_the_slowest_is_named_once_after_three_lines():
    streak = _Streak("computes slowly")
    seconds = {0: 1.0, 1: 1.0, 2: 1.6, 3: 1.0}
    found = [streak.next(seconds, step=2.0, hosts=HOSTS) for _ in range(LINES + 2)]
    assert [slow is not None for slow in found] == [False, False, True, False, False]
    slow = found[LINES - 1]
    assert str(slow).startswith("WARNING: node1 (rank 2) computes slowly: 1.6 times the median")


@pytest.mark.parametrize(
    "lines",
    [
        [{0: 1.0, 1: 1.4}] * 9,  # under 1.5 times
        [{0: 1.0, 1: 2.0}, {0: 2.0, 1: 1.0}] * 5,  # never the same host three times
        [{0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}, {0: 1.0, 1: 1.0}] * 3,
        [{0: 1e-3, 1: 9e-3}] * 9,  # of a step of milliseconds: noise
        [{0: 1e-3, 1: 2.9e-2, 2: 1e-3}] * 9,  # under 3 % of a step: no loss
        [{0: 5.0}] * 9,  # no other to compare with
    ],
)
def test_others_are_not(lines: list[dict[int, float]]):
    streak = _Streak("computes slowly")
    hosts = ["node0", "node1", "node2"]
    assert [streak.next(seconds, step=1.0, hosts=hosts) for seconds in lines] == [None] * len(lines)


def test_a_stage_is_compared_with_itself():
    """Its layers may take longer than those of other stages."""
    hosts = SlowHosts.__new__(SlowHosts)
    hosts.stages = [0, 0, 1, 1]
    assert hosts._slowest_stage([2.0, 2.0, 1.0, 1.1]) == {2: 1.0, 3: 1.1}
    assert hosts._slowest_stage([2.0, 3.4, 1.0, 1.1]) == {0: 2.0, 1: 3.4}


def test_an_own_part_is_of_forward_passes_alone(monkeypatch: pytest.MonkeyPatch):
    clock = 10.0
    monkeypatch.setattr(slow_hosts, "time", SimpleNamespace(perf_counter=lambda: clock))
    part = OwnPart()
    for step in (1, 2):
        for _ in range(2):  # micro-batches
            with part.timed(step):
                clock += 2
            clock += 5  # waiting for another stage
    with torch.no_grad(), part.timed(2):
        clock += 20
    assert part.pop_seconds() == 4
    assert part.pop_seconds() == 0


def test_a_run_of_two_machines_names_the_slow_one(tmp_path: Path):
    """Two ranks pretend to be two machines; one sleeps in each step."""
    from support.launches import launch_calls

    launch_calls(_train_slowly, str(tmp_path), processes=2, log=tmp_path / "log")
    lines = records(tmp_path)
    named = [found for line in lines for found in line.get("slow_hosts", [])]
    slow = [found for found in named if found["what"] == "computes slowly"]
    assert {found["host"] for found in slow} == {"node1"}, lines  # a busy machine may send slowly
    assert slow[0]["ratio"] > slow_hosts.RATIO
    for rank in range(2):
        waits = (tmp_path / f"waits{rank}").read_text().splitlines()
        assert len(waits) > 10
        assert set(waits) == {"0:07:00"}  # no group waits longer for a message


def _train_slowly(folder: str) -> None:
    import os
    import socket

    from support.in_process import MINIMAL
    from torch.distributed import distributed_c10d

    from megatron_smlp.training import forward
    from pretrain_smlp import main

    rank = int(os.environ["RANK"])
    socket.gethostname = lambda: f"node{rank}"
    get_batch = forward.next_batch

    def slow(*args: Any) -> Any:
        waits = [
            str(group._get_backend(torch.device("cpu")).options._timeout)
            for group in distributed_c10d._world.pg_map
            # Megatron sets no timeout for it. No step uses it, and only saves with
            # --dist-ckpt-optim-fully-reshardable-mem-efficient or in older formats do.
            if group.group_desc != "EXPERT_DATA_PARALLEL_GROUP_GLOO"
        ]
        Path(folder, f"waits{rank}").write_text("\n".join(waits))
        time.sleep(0.3 * rank)
        return get_batch(*args)

    forward.next_batch = slow
    flags = MINIMAL.replace("--micro-batch-size 2", "--micro-batch-size 1")
    flags += " --distributed-timeout-minutes 7"
    main([*flags.split(), *["--architecture", "gmlp", "--log-interval", "1", "--log-dir"], folder])


def test_building_the_datasets_is_in_no_steps_time(monkeypatch: pytest.MonkeyPatch):
    """They are built after the model, and take minutes where a sample index is new."""
    events: list[str] = []

    def note(kind: Any, name: str) -> None:
        whole = getattr(kind, name)

        def noting(*args: object, **kwargs: object) -> object:
            found = whole(*args, **kwargs)
            events.append(name)
            return found

        monkeypatch.setattr(kind, name, noting)

    for kind, name in ((batches, "run_datasets"), (StepClock, "restart"), (StepClock, "step")):
        note(kind, name)
    with pretrained("--architecture gmlp --train-iters 1"):
        pass
    first = events.index("step")
    assert "run_datasets" in events[:first]
    assert events[first - 1] == "restart"
