"""Whether a process lives."""

import contextlib

import psutil


def lives(process: int) -> bool:
    """Not what only waits to be reaped: a container's first process may reap nobody."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(process).status() != psutil.STATUS_ZOMBIE)
    return False
