"""Runs on rank 0 first, then on the others, what may take longer than a collective's timeout.

A collective times out after --distributed-timeout-minutes, so that no rank waits for a dead one.
Here they wait on rank 0's store instead, as long as it answers, which shows that rank 0 is alive.
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

SILENCE = 180.0
"""Seconds without an answer from the store after which rank 0 is given up, by default."""
FIRST_NOTICE, NOTICE = 15.0, 60.0
"""Seconds until rank 0 first says what it is doing, and between later notices."""
LAST_PAUSE = 1.0
"""Maximum seconds between two polls of the store; the pause grows up to this."""
ROUNDS = itertools.count()
"""Makes keys unique, as a store may outlive a run; all ranks make equally many calls."""


@contextmanager
def first_rank_first(rank: int, *, silence: float = SILENCE) -> Iterator[None]:
    """Run the block on rank 0, then on the others; all leave it together. Collective.

    Args:
        silence: seconds without an answer from the store after which rank 0 is given up.

    Raises (on the others):
        DataError: a rank failed; carries its message.
        TimeoutError: rank 0's machine does not answer.
    """
    if not torch.distributed.is_initialized():
        yield
        return
    store, key = _get_default_store(), f"first rank first/{next(ROUNDS)}"
    if rank > 0 and (problem := _awaited(store, key, silence=silence)):
        raise DataError(problem)
    problem = f"rank {rank} was interrupted"
    try:
        yield
        problem = ""
    except Exception as error:
        problem = f"{error}" or type(error).__name__
        raise
    finally:
        if rank == 0:
            store.set(key, problem)
        elif problem:
            store.set(f"{key}/all ready", problem)
    if store.add(f"{key}/ready", 1) == torch.distributed.get_world_size():
        store.set(f"{key}/all ready", "")
    if problem := _awaited(store, f"{key}/all ready", silence=silence):
        raise DataError(problem)


def await_all_ranks(rank: int) -> None:
    """Wait until every rank is here, which may take longer than a collective's timeout.
    Collective."""
    with first_rank_first(rank):
        pass


def _awaited(store: torch.distributed.Store, key: str, *, silence: float) -> str:
    """Return a key's value once it is set; poll in a thread, as a frozen store never answers."""
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
    """Say at intervals what is taking so long, if the block does."""
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
