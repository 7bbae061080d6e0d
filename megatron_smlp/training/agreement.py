"""Agree across ranks on what all must know about a step, in one all-reduce that nobody waits for.

    some rank's loss is not finite     -> the update is skipped       (--nonfinite-loss)
    some rank received a signal        -> the step is finished, saved, and the run ends
    some rank is out of time           -> the same                    (--exit-duration-in-mins)

The all-reduce is launched once a step's gradients are ready, along with that of their norm. Before
the update the host must wait for the norm anyway; by then this result has reached the host too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.training import get_signal_handler
from torch import Tensor

REASONS = ("", "a signal", "--exit-duration-in-mins")
"""Why a run ends, by the number in a step's message."""


@dataclass(frozen=True)
class Agreed:
    """What the ranks agreed on; the same on all of them."""

    nonfinite_rank: int | None
    """The highest rank with a non-finite loss."""
    ends: str
    """Why the run ends after this step: a rank was signalled or is out of time; empty: neither."""


class StepAgreement:
    """Exchanges one message per step.

    Args:
        pop_nonfinite: returns whether a loss of this rank was non-finite, <bool>[] on the device,
            or None.
        began: `time.time()` from which --exit-duration-in-mins counts.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        *,
        pop_nonfinite: Callable[[], Tensor | None],
        began: float,
    ) -> None:
        self.args, self.pop_nonfinite, self.began = args, pop_nonfinite, began
        self._numbers: Tensor | None = None
        self._copied: Any = None

    def send(self) -> None:
        """Send this rank's state. Collective; the host does not wait."""
        numbers = torch.zeros(2, dtype=torch.int64, device=torch.cuda.current_device())
        nonfinite = self.pop_nonfinite()
        if nonfinite is not None:
            numbers[0] = (torch.distributed.get_rank() + 1) * nonfinite
        if reason := 1 if get_signal_handler()._signal_received else 2 * self._is_late():
            numbers[1].fill_(reason)
        torch.distributed.all_reduce(numbers, op=torch.distributed.ReduceOp.MAX)
        self._numbers = numbers.to("cpu", non_blocking=True)
        if numbers.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> Agreed:
        """Return the result of the last `send`, waiting for it if necessary."""
        assert self._numbers is not None, "nothing was sent"
        if self._copied is not None:
            self._copied.synchronize()
        rank, reason = self._numbers.tolist()
        return Agreed(rank - 1 if rank else None, REASONS[reason])

    def _is_late(self) -> bool:
        limit = self.args.exit_duration_in_mins
        return bool(limit) and time.time() - self.began > 60 * limit
