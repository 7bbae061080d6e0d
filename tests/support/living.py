"""Whether a process lives, what runs in it, and what it has started."""

import contextlib

import psutil


def lives(process: int) -> bool:
    """Not what only waits to be reaped: a container's first process may reap nobody."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(process).status() != psutil.STATUS_ZOMBIE)
    return False


def command_of(process: int) -> list[str]:
    """The words of its command line; none of a process that has ended."""
    with contextlib.suppress(psutil.Error):
        return psutil.Process(process).cmdline()
    return []


def children_of(process: int) -> list[int]:
    """None of a process that has ended."""
    with contextlib.suppress(psutil.Error):
        return [child.pid for child in psutil.Process(process).children()]
    return []
