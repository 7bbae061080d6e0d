"""Let rank 0 do first, and then all ranks, what may take longer than a collective is allowed to.

A collective ends after --distributed-timeout-minutes, so that no rank waits for a dead one. Here
they wait on rank 0's store, for as long as that answers: then its process lives.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.distributed.distributed_c10d import _get_default_store

from megatron_smlp.errors import DataError

FIRST_NOTICE, NOTICE = 15.0, 60.0
"""Seconds after which rank 0 says what it does, and from then on."""
LAST_PAUSE = 1.0
"""Seconds between two questions to the store, which grow up to here."""
ROUNDS = itertools.count()
"""A store may outlive a run; all ranks come here equally often."""


@contextmanager
def first_rank_first(rank: int, *, silence: float) -> Iterator[None]:
    """Run the block on rank 0, then on the others, and leave it together. Collective.

    Args:
        silence: seconds without an answer of the store after which rank 0 is given up.

    Raises (on the others):
        DataError: what rank 0 failed of.
        TimeoutError: its machine does not answer.
    """
    if not torch.distributed.is_initialized():
        yield
        return
    store, key = _get_default_store(), f"first rank first/{next(ROUNDS)}"
    if rank > 0 and (problem := _awaited(store, key, silence=silence)):
        raise DataError(problem)
    problem = "rank 0 was interrupted"
    try:
        yield
        problem = ""
    except Exception as error:
        problem = f"{error}" or type(error).__name__
        raise
    finally:
        if rank == 0:
            store.set(key, problem)
    if store.add(f"{key}/ready", 1) == torch.distributed.get_world_size():
        store.set(f"{key}/all ready", "")
    _awaited(store, f"{key}/all ready", silence=silence)


def _awaited(store: torch.distributed.Store, key: str, *, silence: float) -> str:
    """Return the value of a key once it is there; a store that is frozen answers nothing, ever."""
    answered = time.monotonic()
    failures: list[Exception] = []

    def ask() -> None:
        nonlocal answered
        pause = 0.01
        try:
            while not store.check([key]):
                answered = time.monotonic()
                time.sleep(pause)
                pause = min(2 * pause, LAST_PAUSE)
        except Exception as error:
            failures.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    while asking.is_alive():
        asking.join(LAST_PAUSE)
        if asking.is_alive() and time.monotonic() - answered > silence:
            raise TimeoutError(f"the machine of rank 0 has not answered for {silence:.0f} s")
    if failures:
        raise failures[0]
    return store.get(key).decode()


@contextmanager
def telling(what: str, say: Callable[[str], None]) -> Iterator[None]:
    """Say what takes so long, where it does."""
    over = threading.Event()

    def tell() -> None:
        began, pause = time.monotonic(), FIRST_NOTICE
        while not over.wait(pause):
            say(f"{what}: {time.monotonic() - began:.0f} s so far")
            pause = NOTICE

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
