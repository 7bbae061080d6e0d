"""Exit codes of a launch's processes, and how they are reported to the user. No torch."""

from __future__ import annotations

import signal
import socket

from megatron_smlp.errors import NonFiniteLossError, UsageError
from megatron_smlp.unwritable_log import to_stderr

NO_PROGRESS = 93
"""Exit code of a run that fails without a newer checkpoint: restarting it would not help."""
WRONG_USE = UsageError.exit_code
FOR_GOOD = (WRONG_USE, NonFiniteLossError.exit_code, NO_PROGRESS)
"""Exit codes after which a run is not restarted; wrong flags and a loss or gradient that is not
finite are among them, since both would recur."""
CLOSED = 76
"""Exit code of an agent: another machine has ended the run for good."""
MISSING = 75
"""Exit code: others have not rejoined within REJOIN_TIMEOUT. sysexits.h calls it a temporary
failure: with healthy machines the same run goes on, so that a queue may restart it."""

AGAIN = 80
"""Base of an agent's exit code if it may be restarted: this plus the number of its ranks' failures
without a newer checkpoint."""


def end_of(code: int) -> str:
    """Describe a process's exit code, for example `was ended by SIGKILL`."""
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"


def say(text: str) -> None:
    """Print one line to stderr, with this machine's name."""
    to_stderr(f"launch: {socket.gethostname()}: {text}")
