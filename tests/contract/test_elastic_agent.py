"""torchrun's agent is still what megatron_patches/elastic_agent.py and launching/agent.py need."""

import inspect
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.rendezvous import dynamic_rendezvous
from torch.distributed.launcher import api

from megatron_smlp.launching.agent import Agent
from megatron_smlp.megatron_patches import elastic_agent

HOLDER = dynamic_rendezvous._BackendRendezvousStateHolder


def test_a_restart_still_forgets_the_shutdown_timeout():
    """The reason for our own `_stop_workers`; once this fails, that may go."""
    source = inspect.getsource(LocalElasticAgent._stop_workers)
    assert "self._shutdown()" in source
    assert "timeout: int = 30" in inspect.getsource(LocalElasticAgent._shutdown)


@pytest.mark.parametrize(
    "name",
    ["run", "_monitor_workers", "_restart_workers", "_stop_workers", "_shutdown", "_exit_barrier"],
)
def test_what_is_overridden_is_there(name: str):
    ours, theirs = (list(inspect.signature(getattr(c, name)).parameters) for c in AGENTS)
    assert ours == theirs


AGENTS = (Agent, LocalElasticAgent)


def test_the_agent_is_looked_up_where_it_is_replaced():
    original = api.LocalElasticAgent
    with elastic_agent.installed(Agent, lambda state, settings: None):
        assert api.LocalElasticAgent is Agent
        assert HOLDER._sanitize.__module__ == elastic_agent.__name__
    assert api.LocalElasticAgent is original
    launching = inspect.getsource(api.launch_agent)
    assert "LocalElasticAgent(" in launching
    assert "spec.rdzv_handler.shutdown()" in launching  # of a spec whose handler is replaced


def node(name: str) -> Any:
    return dynamic_rendezvous._NodeDesc(name, 1, 0)


def sanitized(state: Any) -> list[Any]:
    """Return the nodes that one `_sanitize` leaves in the rendezvous."""
    settings = SimpleNamespace(
        keep_alive_interval=timedelta(seconds=5),
        keep_alive_max_attempt=3,
        min_nodes=2,
        max_nodes=2,
        run_id="x",
    )
    HOLDER._sanitize(SimpleNamespace(_state=state, _settings=settings, _dead_nodes=[]))
    return sorted(found.addr for found in state.participants)


def two_nodes(*, skew: timedelta) -> Any:
    state = dynamic_rendezvous._RendezvousState()
    now = datetime.now(UTC)
    for name, beat in (("here", now), ("there", now + skew)):
        state.participants[node(name)] = 0
        state.last_heartbeats[node(name)] = beat
    return state


@pytest.mark.parametrize("hours", [-1, 1])
def test_clocks_may_differ_by_an_hour(hours: int):
    """Unpatched, torch considers a node whose clock is behind dead."""
    state = two_nodes(skew=timedelta(hours=hours))
    with elastic_agent.installed(Agent, lambda state, settings: None):
        assert sanitized(state) == ["here", "there"]
        beats = state.last_heartbeats  # what is shared keeps the times that the nodes wrote
        assert (beats[node("there")] > beats[node("here")]) == (hours > 0)
    assert sanitized(two_nodes(skew=timedelta(hours=-1))) == ["here"]


def test_who_waits_for_a_complete_round_is_its_spare():
    """Unpatched, the participants see a node that waits, and restart for it."""
    state = two_nodes(skew=timedelta(0))
    state.complete = True
    state.wait_list = {node("late")}
    sanitized(state)
    assert state.wait_list
    with elastic_agent.installed(Agent, lambda state, settings: None):
        sanitized(state)
    assert (state.wait_list, state.redundancy_list) == (set(), {node("late")})


def test_a_node_that_stops_beating_is_gone(monkeypatch: pytest.MonkeyPatch):
    """This machine's clock decides, although the node's own is an hour ahead."""
    now = [1000.0]
    monkeypatch.setattr(elastic_agent.time, "monotonic", lambda: now[0])
    state, told = two_nodes(skew=timedelta(hours=1)), []
    with elastic_agent.installed(Agent, lambda state, settings: told.append(settings.run_id)):
        assert sanitized(state) == ["here", "there"]
        now[0] += 16
        state.last_heartbeats[node("here")] += timedelta(seconds=16)
        assert sanitized(state) == ["here"]
    assert told == ["x", "x"]
