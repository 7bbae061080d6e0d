"""Processes that train together, forked from one that has imported everything.

torchrun imports torch, and each of its ranks imports Megatron, before the first step: ten core
seconds per rank. Ranks here get the environment variables that torchrun sets. The launchers' tests
start the real torchrun.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from multiprocessing import get_context
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
TIME_LIMIT = 540  # seconds; less than pytest's own limit, which shows no rank's log


def free_port() -> int:
    """Return a port to listen on, below the ephemeral ports (from 32768 on): an outgoing
    connection could take one of those before it is listened on."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def forkserver() -> BaseContext:
    """Return the context whose processes are forks of one that has imported Megatron."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["support.preloaded"])
    for folder in (REPOSITORY / "tests", REPOSITORY):  # pretrain_smlp.py is not part of the package
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    return context


def run_ranks(
    context: BaseContext,
    count: int,
    work: Callable[..., None],
    arguments: tuple[Any, ...],
    *,
    log: Path,
    environment: Mapping[str, str],
) -> None:
    """Call `work(*arguments)` in `count` processes; if one fails, end all and raise their log.

    Args:
        log: what the ranks print.
        environment: the whole environment except what torchrun sets.
    """
    port = free_port()
    places = [_place(rank, count, port) for rank in range(count)]
    ranks = [
        rank_process(context, work, arguments, log=log, environment={**environment, **place})
        for place in places
    ]
    log.unlink(missing_ok=True)
    for process in ranks:
        process.start()
    deadline = time.monotonic() + TIME_LIMIT
    try:
        running = list(ranks)
        while running and not any(process.exitcode for process in ranks):
            left = deadline - time.monotonic()
            if not wait([process.sentinel for process in running], timeout=max(left, 0.0)):
                raise AssertionError(f"no end after {TIME_LIMIT} seconds:\n{_tail(log)}")
            running = [process for process in ranks if process.is_alive()]
        for process in running:  # a neighbour failed: its message may come late, and is complete
            process.join(5)
    finally:
        for process in ranks:
            if process.is_alive():
                _end(process.pid)
            process.join()
    codes = [process.exitcode for process in ranks]
    assert codes == [0] * count, f"exit codes {codes} of {arguments}\n{_tail(log)}"


def run_ranks_on_the_stand_in(
    work: Callable[..., None], calls: Iterable[tuple[int, tuple[Any, ...], Path]]
) -> None:
    """Let the CPU stand in for a CUDA device in this process, and call `work` in ranks forked from
    it, one launch after another.

    Args:
        calls: number of processes, arguments of `work`, log.
    """
    from support import cuda_stand_in
    from support.launches import clean_environment

    cuda_stand_in.install()
    import support.preloaded  # noqa: F401  # Megatron, which must come after that

    fork, environment = get_context("fork"), clean_environment()
    for count, arguments, log in calls:
        run_ranks(fork, count, work, arguments, log=log, environment=environment)


def rank_process(
    context: BaseContext,
    work: Callable[..., None],
    arguments: tuple[Any, ...],
    *,
    log: Path,
    environment: Mapping[str, str],
) -> Any:
    """Return a process of the context, not yet started, that calls `work(*arguments)`."""
    return context.Process(  # type: ignore[attr-defined]
        target=_rank, args=(work, arguments, log, dict(environment))
    )


def _place(rank: int, count: int, port: int) -> dict[str, str]:
    if count == 1:
        return {}
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    return {name: str(value) for name, value in numbers.items()} | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _rank(
    work: Callable[..., None], arguments: tuple[Any, ...], log: Path, environment: dict[str, str]
) -> None:
    os.setsid()  # a time limit ends the rank's own workers too
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the suite may run under nohup
    os.chdir(REPOSITORY)
    os.environ.clear()
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(output)
    try:
        work(*arguments)
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) else None
        if not (isinstance(code, int) and code):  # else the reason is printed
            traceback.print_exc()
            code = 1
        sys.stderr.flush()
        os._exit(code)  # other ranks may wait in a collective: there is no clean exit


def _end(process: int) -> None:
    try:
        os.killpg(process, signal.SIGKILL)
    except ProcessLookupError:  # it has no group of its own yet, or has ended
        os.kill(process, signal.SIGKILL)


def _tail(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-20000:] if log.is_file() else ""
