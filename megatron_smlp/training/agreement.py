"""Tell all ranks what they must know about a step, in one message that nobody waits for.

    rank of a loss that is not finite  -> the update is held back     (--nonfinite-loss)
    a signal has come to some rank     -> the step is finished, saved, and the run ends
    the time is over on some rank      -> the same                    (--exit-duration-in-mins)

The message goes out when a step's gradients are there, and travels beside their norm. Before the
update the host reads the norm, for which it waits until the device has come that far: by then the
answer is on the host too.
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


@dataclass(frozen=True)
class Agreed:
    """What the ranks agreed on; it is the same on all of them."""

    nonfinite_rank: int | None
    """The last one with such a loss."""
    is_signalled: bool
    is_over: bool
    """The time that the run may take."""


class StepAgreement:
    """One message for each step.

    Args:
        pop_nonfinite: <bool>[] on the device, or None, whether a loss of this rank was not finite.
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
        """Tell the others. Collective; the host does not wait."""
        numbers = torch.zeros(3, dtype=torch.int64, device=torch.cuda.current_device())
        nonfinite = self.pop_nonfinite()
        if nonfinite is not None:
            numbers[0] = (torch.distributed.get_rank() + 1) * nonfinite
        for place, is_so in ((1, get_signal_handler()._signal_received), (2, self._is_late())):
            if is_so:
                numbers[place].fill_(1)
        torch.distributed.all_reduce(numbers, op=torch.distributed.ReduceOp.MAX)
        self._numbers = numbers.to("cpu", non_blocking=True)
        if numbers.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> Agreed:
        """Return the answer to the last message, waiting for it if necessary."""
        assert self._numbers is not None, "nothing was sent"
        if self._copied is not None:
            self._copied.synchronize()
        rank, is_signalled, is_over = self._numbers.tolist()
        return Agreed(rank - 1 if rank else None, bool(is_signalled), bool(is_over))

    def _is_late(self) -> bool:
        limit = self.args.exit_duration_in_mins
        return bool(limit) and time.time() - self.began > 60 * limit
