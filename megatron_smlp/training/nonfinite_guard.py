"""--nonfinite-loss: hold an update back after a loss that is NaN or infinite, or stop there."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from megatron_smlp.errors import NonFiniteLossError
from megatron_smlp.training.agreement import StepAgreement


class NonFiniteGuard:
    """Asked once before each update.

    Args:
        agreement: knows whether a loss of the step was not finite on some rank.
        say: prints a line for the user on rank 0.
    """

    def __init__(
        self, args: argparse.Namespace, *, agreement: StepAgreement, say: Callable[[str], None]
    ) -> None:
        self.args, self.agreement, self.say = args, agreement, say

    def may_update(self) -> bool:
        """Return whether this step's losses were finite, the same on all ranks.

        Raises:
            NonFiniteLossError: on every rank, where --nonfinite-loss is stop.
        """
        rank = self.agreement.read().nonfinite_rank
        if rank is None:
            return True
        message = f"non-finite loss on rank {rank} at iteration {self.args.curr_iteration + 1}"
        if self.args.nonfinite_loss == "stop":
            raise NonFiniteLossError(
                f"{message}: stopped before the update (--nonfinite-loss stop). Lower --lr or "
                "--clip-grad, check the data there, or go on without such steps by "
                "--nonfinite-loss skip."
            )
        self.say(f"{message}: this step's update is skipped")
        return False
