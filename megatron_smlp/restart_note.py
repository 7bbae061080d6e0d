"""Why a rank was restarted: a note that its launcher leaves in the environment. No torch."""

from __future__ import annotations

import json
import os
import time
from collections.abc import MutableMapping

RESTART = "SMLP_RESTART"
"""The environment variable with the note; not set at a run's first start."""


def note_cause(cause: str, environment: MutableMapping[str, str]) -> None:
    """Leave the cause, with the time by this machine's clock, to the ranks that start next."""
    environment[RESTART] = json.dumps({"cause": cause, "noticed": time.monotonic()})


def cause_of(note: str) -> str:
    """Return the cause in a note from another machine, whose clock is meaningless here."""
    return str(json.loads(note)["cause"])


def noted_cause() -> tuple[str, float] | None:
    """Return why this rank was restarted, and how many seconds ago the cause was noticed."""
    text = os.environ.get(RESTART)
    if not text:
        return None
    noted = json.loads(text)
    return str(noted["cause"]), time.monotonic() - float(noted["noticed"])
