"""Whether a process is alive, its command line, and its children."""

import contextlib

import psutil


def lives(process: int) -> bool:
    """Return whether it is alive; a zombie is not, as a container's init may never reap it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(process).status() != psutil.STATUS_ZOMBIE)
    return False


def command_of(process: int) -> list[str]:
    """Return its argv; empty if it has ended."""
    with contextlib.suppress(psutil.Error):
        return psutil.Process(process).cmdline()
    return []


def children_of(process: int) -> list[int]:
    """Return its children; none if it has ended."""
    with contextlib.suppress(psutil.Error):
        return [child.pid for child in psutil.Process(process).children()]
    return []
