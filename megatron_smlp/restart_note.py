"""Why a rank was started again: a note in its environment, from whoever starts it. No torch."""

from __future__ import annotations

import json
import os
import time
from collections.abc import MutableMapping

RESTART = "SMLP_RESTART"
"""The variable with the note; it is not set at a run's first start."""


def note_cause(cause: str, environment: MutableMapping[str, str]) -> None:
    """Leave the cause, and the time by this machine's clock, to the ranks that start next."""
    environment[RESTART] = json.dumps({"cause": cause, "noticed": time.monotonic()})


def cause_of(note: str) -> str:
    """Return the cause in a note of another machine, whose clock says nothing here."""
    return str(json.loads(note)["cause"])


def noted_cause() -> tuple[str, float] | None:
    """Return why this rank was started again, and how many seconds ago that was noticed."""
    text = os.environ.get(RESTART)
    if not text:
        return None
    noted = json.loads(text)
    return str(noted["cause"]), time.monotonic() - float(noted["noticed"])
