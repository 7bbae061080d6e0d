"""End this process when its parent ends, however that ends. Linux only."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

AGENT_PID, LAUNCHER_PID = "SMLP_AGENT", "SMLP_LAUNCHER"
"""The variables that tell a rank its agent's process ID, and an agent its launcher's."""
PR_SET_PDEATHSIG = 1


def end_with_parent(number: signal.Signals, *, parent: int | None = None) -> None:
    """Have the kernel send this process a signal when its parent is gone.

    Args:
        parent: the process that should be this one's parent; None: the current one. If it has
            already died, the signal comes at once.
    """
    if sys.platform != "linux":
        return
    expected = os.getppid() if parent is None else parent
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if os.getppid() != expected:
        os.kill(os.getpid(), number)


def end_with_launcher() -> None:
    """End this agent when its launcher ends; to be called before any slow import."""
    launcher = os.environ.get(LAUNCHER_PID)
    end_with_parent(signal.SIGTERM, parent=int(launcher) if launcher else None)


def end_with_agent() -> None:
    """End this rank when its agent ends, so that port and folder are free for the next one.

    It is killed at once: a SIGTERM would end the ranks of all machines cleanly, and their agents
    would consider the run finished.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        agent = os.environ.get(AGENT_PID)
        end_with_parent(signal.SIGKILL, parent=int(agent) if agent else None)
