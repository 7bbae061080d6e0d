"""How far a conversion is: a bar on a terminal, otherwise a line every ten seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from megatron_smlp.checkpoints.tensors import Spec

LINE_SECONDS = 10.0
GIGABYTE = 1e9


class Progress:
    """Counts the bytes of tensors that are to be written, on stderr."""

    def __init__(self, specs: Mapping[str, Spec]) -> None:
        self.total = sum(spec.nbytes for spec in specs.values())

    def over(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same tensors, counted once they are asked beyond."""
        if sys.stderr.isatty():
            yield from self._with_bar(tensors)
        else:
            yield from self._with_lines(tensors)

    def _with_bar(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = BarColumn(), DownloadColumn(), TimeRemainingColumn()
        with RichProgress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("", total=self.total)
            for name, tensor in tensors:
                size = tensor.nbytes
                yield name, tensor
                del tensor  # before the next one is made
                bar.advance(task, size)

    def _with_lines(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        done, last = 0, time.monotonic()
        for name, tensor in tensors:
            done += tensor.nbytes
            yield name, tensor
            del tensor  # before the next one is made
            if time.monotonic() - last >= LINE_SECONDS:
                last = time.monotonic()
                share = f"{done / GIGABYTE:.1f} of {self.total / GIGABYTE:.1f} GB"
                print(f"{share} written", file=sys.stderr, flush=True)
