"""Progress of a command on stderr: a bar on a terminal, otherwise news every ten seconds."""

import sys
import time
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    import rich.progress

LINE_SECONDS = 10.0


class Progress:
    """Use as a context manager. Without a total, percentage and remaining time are not shown."""

    def __init__(self, total: int | None) -> None:
        self.total = total
        self.bar: rich.progress.Progress | None = None
        self.shown_at = time.monotonic()
        self.said = ""

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            self.bar = _new_bar(self.total)
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def show(self, done: int, text: str) -> None:
        """Show that `done` of the total are done; `text` says so in words."""
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=done, description=text)
        elif time.monotonic() - self.shown_at >= LINE_SECONDS:
            self.shown_at = time.monotonic()
            if text != self.said:
                print(text, file=sys.stderr, flush=True)
                self.said = text


def _new_bar(total: int | None) -> "rich.progress.Progress":
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    share = [TextColumn("{task.percentage:3.0f}%")] if total else []
    text = TextColumn("{task.description}", markup=False)
    bar = Progress(BarColumn(), *share, text, TimeRemainingColumn(), console=Console(stderr=True))
    bar.add_task("starting", total=total)
    return bar
