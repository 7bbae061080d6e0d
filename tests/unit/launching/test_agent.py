"""What the agents of a rendezvous round tell each other, over torch's own stores."""

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.distributed import DistStoreError, FileStore, HashStore, PrefixStore, Store
from torch.distributed.elastic.agent.server.api import RunResult, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

from megatron_smlp.errors import UsageError
from megatron_smlp.launching.agent import Agent
from megatron_smlp.launching.exit_codes import FOR_GOOD, MISSING, NO_PROGRESS
from megatron_smlp.launching.failures import Failures
from megatron_smlp.launching.rendezvous import DONE, Rendezvous, agree_on_restart, are_alike
from megatron_smlp.restart_note import RESTART, note_cause

LONG_AGO = -1e9
"""On another machine's monotonic clock, which started at another time."""


def causes_after(store: Store, *environments: dict[str, str]) -> list[str | None]:
    """Return the cause that each machine's ranks are told in a round of these machines."""
    store.set_timeout(timedelta(seconds=20))

    def join(environment: dict[str, str]) -> str | None:
        agree_on_restart(store, machines=len(environments), environment=environment)
        return json.loads(environment[RESTART])["cause"] if RESTART in environment else None

    with ThreadPoolExecutor(len(environments)) as machines:
        return list(machines.map(join, environments))


def test_a_machine_that_has_seen_no_failure_learns_of_it(tmp_path: Path):
    whole = FileStore(str(tmp_path / "store"), -1)
    first, second, spare = {}, {}, {}
    assert causes_after(PrefixStore("1", whole), first, second) == [None, None]
    note_cause("rank 3 ended with 1", first)
    note_cause("a machine went", second)
    own = dict(first)
    (here, there, new) = causes_after(PrefixStore("2", whole), first, second, spare)
    assert (here, there) == ("rank 3 ended with 1", "a machine went")
    assert new in (here, there)
    assert first == own


def test_the_clock_of_a_note_is_that_of_its_reader():
    failed = {RESTART: json.dumps({"cause": "it", "noticed": LONG_AGO})}
    spare: dict[str, str] = {}
    assert causes_after(HashStore(), failed, spare) == ["it", "it"]
    assert json.loads(spare[RESTART])["noticed"] > LONG_AGO


def test_a_machine_with_another_number_of_processes_is_refused():
    """It refuses itself; the others learn that they must go on without it."""
    store = HashStore()
    for machine, processes in enumerate((1, 8, 8)):
        store.set(f"processes/{machine}", str(processes))
    assert not are_alike(store, machines=3, processes=8)
    with pytest.raises(UsageError, match="NPROC_PER_NODE is 1 here, and 8 on the other machines"):
        are_alike(store, machines=3, processes=1)
    with pytest.raises(UsageError, match="is 1 here, and 8 on"):  # one of each: the larger one
        are_alike(store, machines=2, processes=1)
    store.set("processes/0", "8")
    assert are_alike(store, machines=3, processes=8)


def test_a_machine_that_goes_before_it_answers_is_not_waited_for_for_ever():
    store = HashStore()
    store.set_timeout(timedelta(seconds=0.1))
    with pytest.raises(DistStoreError):
        agree_on_restart(store, machines=2, environment={})


@pytest.mark.parametrize(("machine", "final"), [(0, FOR_GOOD), (3, (3, NO_PROGRESS))])
def test_wrong_use_is_the_runs_where_the_first_machine_says_so(
    machine: int, final: tuple[int, ...]
):
    """If only another machine says so, it lacks something of its own, such as a driver."""
    agent = Agent.__new__(Agent)
    agent._worker_group = SimpleNamespace(group_rank=machine)
    agent._first_machine_ended = lambda: False  # type: ignore[method-assign]
    codes = (1, 2, 3, 76, NO_PROGRESS, -9)
    assert tuple(code for code in codes if agent._final_code([code]) != 1) == final


@pytest.mark.parametrize(
    ("here", "spares", "hosts", "goes_on"),
    [
        (2, [], False, False),  # as few as may be
        (3, [], False, True),
        (2, ["a spare"], False, True),
        (3, ["a spare"], True, False),  # the store is on this machine
    ],
)
def test_a_machine_that_may_be_broken_leaves_a_run_that_can_do_without_it(
    here: int, spares: list[str], hosts: bool, goes_on: bool
):
    agent = waiting_agent(HashStore(), least=2, waiting=0, here=here)
    agent.hosts, agent.rendezvous.state.redundancy_list = hosts, set(spares)
    agent.failures, agent._remaining_restarts = Failures([]), 3
    agent.failures.count = Failures.LIMIT - 1
    agent._decide(
        RunResult(WorkerState.FAILED, failures={1: SimpleNamespace(exitcode=1, timestamp=0)})
    )
    assert agent.code == (MISSING if goes_on else NO_PROGRESS)
    assert agent._remaining_restarts == 0


def waiting_agent(store: Store, *, least: int, waiting: int, here: int) -> Agent:
    """Return the agent of machine 0 of two, with these numbers waiting and in the round."""
    agent = Agent.__new__(Agent)
    agent._worker_group = SimpleNamespace(group_rank=0, group_world_size=2)
    agent._store = store
    state = SimpleNamespace(participants=range(here))
    agent.rendezvous = SimpleNamespace(  # type: ignore[assignment]
        settings=SimpleNamespace(min_nodes=least, max_nodes=2),
        is_over=lambda: False,
        num_nodes_waiting=lambda: waiting,
        state=state,
    )
    return agent


@pytest.mark.parametrize(
    ("least", "waiting", "here", "is_over"),
    [
        (2, 0, 2, True),  # nobody comes before the timeout
        (2, 1, 2, True),  # another machine waits, but the number is fixed
        (2, 0, 1, True),
        (2, 1, 1, False),  # the other machine's ranks failed after these had ended
        (1, 1, 2, False),  # a machine that another agent saw first
    ],
)
def test_ranks_that_ended_start_again_where_a_machine_waits_for_them(
    least: int, waiting: int, here: int, is_over: bool
):
    agent = waiting_agent(HashStore(), least=least, waiting=waiting, here=here)
    assert agent._others_end(0.0) == is_over


def test_a_run_is_over_when_the_ranks_of_all_machines_have_ended(tmp_path: Path):
    store = FileStore(str(tmp_path / "store"), -1)
    store.set(f"{DONE}/1", "")
    agent = waiting_agent(store, least=1, waiting=1, here=1)
    assert agent._others_end(60.0)
    assert store.check([f"{DONE}/0"])


def test_ranks_that_hang_in_the_kernel_are_a_failure(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.environ", {})
    hung = RunResult(state=WorkerState.UNHEALTHY)
    monkeypatch.setattr(LocalElasticAgent, "_monitor_workers", lambda self, group: hung)
    agent = Agent.__new__(Agent)
    agent.failures, agent.code, agent.hangs, agent._remaining_restarts = Failures([]), 1, False, 3
    agent.failures.count = Failures.LIMIT - 1
    assert agent._monitor_workers(None) is hung  # type: ignore[arg-type]
    assert agent.hangs
    assert (agent.code, agent._remaining_restarts) == (1, 0)  # of this machine alone


def test_the_others_go_on_without_a_machine_that_was_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("megatron_smlp.launching.rendezvous.LOOKS", 0)
    monkeypatch.setattr("os.environ", {})
    rounds = [(8, 1), (8, 8)]

    def join() -> SimpleNamespace:
        store, counts = HashStore(), rounds.pop(0)
        store.add("machines that know of restarts", len(counts) - 1)
        for machine, processes in enumerate(counts):
            store.set(f"processes/{machine}", str(processes))
        return SimpleNamespace(store=store, rank=0, world_size=len(counts))

    handler = SimpleNamespace(next_rendezvous=join)
    rendezvous = Rendezvous(
        handler, processes=8, watch=SimpleNamespace(), closes=False, code=lambda: 1
    )  # type: ignore[arg-type]
    rendezvous.is_new = False
    assert rendezvous.next_rendezvous().store is rendezvous.round
    assert not rounds
