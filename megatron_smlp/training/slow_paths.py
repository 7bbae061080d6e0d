"""Say on the console what runs in a slower way than it could, which is otherwise only in the log.

This package's operators and layers warn in the log, once, of what runs without its kernels. The
first rank's log is not enough: of a pipeline it may have no layer of that kind.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from megatron_smlp.collectives import gathered


class SlowPaths(logging.Handler):
    """Keeps the warnings of this package on this rank."""

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
