"""Progress on the console: a bar on a terminal, a line every so often in a log file."""

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_smlp.data.prepare.output import Counts

MEGABYTE = 1e6
LOG_SECONDS = 10.0


class ProgressReport:
    """MB/s of input text, documents, tokens and time left; all to stderr.

    `total_bytes` is the size of the input on disk; for compressed input it is not comparable with
    the text read, and no time left is shown (pass None).
    """

    def __init__(self, total_bytes: int | None) -> None:
        self.total_bytes = total_bytes
        self.bar: Any = None
        self.began = self.logged = time.monotonic()
        self.start: tuple[int, int] | None = None
        """Bytes and documents at the first report: what an earlier run did, and the start-up, say
        nothing about the speed of this one."""

    def __enter__(self) -> "ProgressReport":
        if sys.stderr.isatty():
            self.bar, self.task = _make_bar(self.total_bytes)
            self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def update(self, counts: "Counts") -> None:
        """Called after each chunk."""
        if self.start is None:
            self.start = counts.text_bytes, counts.documents
            self.began = self.logged = time.monotonic()
        line = self._line(counts)
        if self.bar is not None:
            self.bar.update(self.task, completed=counts.text_bytes, rates=line)
        elif time.monotonic() - self.logged >= LOG_SECONDS:
            self.logged = time.monotonic()
            print(line, file=sys.stderr, flush=True)

    def _line(self, counts: "Counts") -> str:
        seconds = max(time.monotonic() - self.began, 1e-9)
        bytes_before, documents_before = self.start or (0, 0)
        text_rate = (counts.text_bytes - bytes_before) / MEGABYTE / seconds
        document_rate = (counts.documents - documents_before) / seconds
        line = (
            f"{counts.text_bytes / MEGABYTE:,.0f} MB, {text_rate:.1f} MB/s, "
            f"{counts.documents:,} documents ({document_rate:,.0f}/s), "
            f"{counts.tokens:,} tokens"
        )
        if counts.num_rejected:
            line += f", {counts.num_rejected:,} rejected"
        return line


def _make_bar(total_bytes: int | None) -> tuple[Any, Any]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%" if total_bytes else ""),
        TextColumn("{task.fields[rates]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    return bar, bar.add_task("", total=total_bytes, rates="starting")
