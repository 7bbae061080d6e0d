"""Exit codes of a launch's processes, and how one is told to the user. No torch."""

from __future__ import annotations

import signal
import socket

from megatron_smlp.errors import NonFiniteLossError, UsageError
from megatron_smlp.unwritable_log import to_stderr

NO_PROGRESS = 93
"""The exit code of a run that fails without a newer checkpoint: starting it again is of no use."""
WRONG_USE = UsageError.exit_code
FOR_GOOD = (WRONG_USE, NonFiniteLossError.exit_code, NO_PROGRESS)
"""Exit codes after which a run is not started again: of wrong flags and of a loss or
gradient that is not finite too, since both would come again."""
CLOSED = 76
"""Exit code of an agent: another machine has ended the run for good."""
MISSING = 75
"""Others have not come back within REJOIN_TIMEOUT. sysexits.h calls it a temporary failure: with
machines that are whole the same run goes on, so that a queue may start it again."""

AGAIN = 80
"""Base of an agent's exit code if it may be restarted: this plus the number of its ranks' failures
without a newer checkpoint."""


def end_of(code: int) -> str:
    """`was ended by SIGKILL`, of a process's exit code."""
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"


def say(text: str) -> None:
    """One line of this machine's."""
    to_stderr(f"launch: {socket.gethostname()}: {text}")
