"""Replaces torchrun's agent with ours, and mends its rendezvous: which machines are gone, by the
local clock, and which are spares.

Active only in the process of an agent (launching/agent.py), never in a rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from typing import Any

from torch.distributed.elastic.rendezvous import dynamic_rendezvous
from torch.distributed.launcher import api

from megatron_smlp.megatron_patches.wrapping import wrapped_in

type Synced = Callable[[Any, Any], None]


def installed(make_agent: Callable[..., Any], synced: Synced) -> AbstractContextManager[None]:
    """Replace both for the duration of one launch, then restore the originals.

    Args:
        make_agent: called in place of LocalElasticAgent, with the same arguments.
        synced: called with the rendezvous state and settings each time they were read, in the
            thread that read them.
    """
    holder = dynamic_rendezvous._BackendRendezvousStateHolder
    return wrapped_in(
        (api, "LocalElasticAgent", lambda _: make_agent),
        (holder, "_sanitize", lambda sanitize: _mended(sanitize, synced)),
    )


def _mended(sanitize: Callable[[Any], None], synced: Synced) -> Callable[[Any], None]:
    """Date each node's heartbeat by when this node saw it change, and let those that wait for a
    complete round be its spares.

    torch compares timestamps of the other nodes' clocks with this node's: a skew of 15 seconds is
    enough to declare every other node dead. A node that waited for a round and found it complete
    stays on torch's wait list, for which the others restart, again and again.
    """
    seen: dict[Any, tuple[datetime, float]] = {}

    def sanitized(self: Any) -> None:
        state, now = self._state, time.monotonic()
        beats = dict(state.last_heartbeats)
        for node, beat in beats.items():
            if node not in seen or seen[node][0] != beat:
                seen[node] = (beat, now)
        here = datetime.now(UTC)
        state.last_heartbeats = {
            node: here - timedelta(seconds=now - seen[node][1]) for node in beats
        }
        sanitize(self)
        state.last_heartbeats = {node: beats[node] for node in state.last_heartbeats}
        if state.complete and len(state.participants) == self._settings.max_nodes:
            state.redundancy_list |= state.wait_list
            state.wait_list.clear()
        synced(state, self._settings)

    return sanitized
