"""--nonfinite-loss: hold an update back after a loss that is NaN or infinite, or stop there."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from megatron_smlp.errors import NonFiniteLossError
from megatron_smlp.training.step import ForwardStep


class NonFiniteGuard:
    """Asked before each update.

    Args:
        step: remembers whether a loss of the step was not finite.
        say: prints a line for the user on rank 0.
    """

    def __init__(
        self, args: argparse.Namespace, *, step: ForwardStep, say: Callable[[str], None]
    ) -> None:
        self.args, self.step, self.say = args, step, say

    def may_update(self) -> bool:
        """Return whether this step's losses were finite, the same on all ranks. Collective.

        Raises:
            NonFiniteLossError: on every rank, where --nonfinite-loss is stop.
        """
        rank = torch.distributed.get_rank()
        bad = torch.zeros((), dtype=torch.int64, device=torch.cuda.current_device())
        nonfinite = self.step.pop_nonfinite()
        if nonfinite is not None:
            bad += (rank + 1) * nonfinite
        torch.distributed.all_reduce(bad, op=torch.distributed.ReduceOp.MAX)
        found = int(bad)
        if not found:
            return True
        message = f"non-finite loss on rank {found - 1} at iteration {self.args.curr_iteration + 1}"
        if self.args.nonfinite_loss == "stop":
            raise NonFiniteLossError(
                f"{message}: stopped before the update (--nonfinite-loss stop). Lower --lr or "
                "--clip-grad, check the data there, or go on without such steps by "
                "--nonfinite-loss skip."
            )
        self.say(f"{message}: this step's update is skipped")
        return False
