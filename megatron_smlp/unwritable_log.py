"""A log that cannot be written, as on a full disk: its lines are lost, and the run lives on."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path


class UnwritableLog:
    """Says once, on standard error, that lines of `path` are lost."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_said = False

    @contextlib.contextmanager
    def tolerated(self) -> Iterator[None]:
        """Let no OSError out."""
        try:
            yield
        except OSError as error:
            if not self.is_said:
                self.is_said = True
                print(
                    f"WARNING: {self.path} cannot be written ({error.strerror}): its lines are "
                    "LOST as long as that is so; the run goes on. Make room there.",
                    file=sys.__stderr__,
                    flush=True,
                )
