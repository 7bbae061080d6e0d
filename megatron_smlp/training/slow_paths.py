"""Repeats on the console warnings about slow paths, which are otherwise in the log only.

This package's operators and layers warn in the log, once, about what runs without its kernels. The
first rank's log is not enough: in a pipeline that rank may have no layer of that kind.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from megatron_smlp.collectives import gathered


class SlowPaths(logging.Handler):
    """Collects this package's warnings on this rank."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        logger = logging.getLogger("megatron_smlp")
        logger.addHandler(self)
        try:
            yield
        finally:
            logger.removeHandler(self)

    def of_all_ranks(self) -> list[str]:
        """Return each warning once. Collective."""
        return list(dict.fromkeys(text for texts in gathered(self.texts) for text in texts))
