"""Hold an update back where a loss is not finite: --nonfinite-loss.

step.py                             sees the loss of this rank, without waiting for it
agreement.py                        tells all ranks
megatron_patches/training_loop.py   asks here, before the optimizer's update
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from megatron_smlp.errors import NonFiniteLossError
from megatron_smlp.training.agreement import StepAgreement


def may_update(
    args: argparse.Namespace, agreement: StepAgreement, say: Callable[[str], None]
) -> bool:
    """Return whether the step's losses were finite, the same on all ranks: --nonfinite-loss.

    Raises:
        NonFiniteLossError: on every rank, where --nonfinite-loss is stop.
    """
    rank = agreement.read().nonfinite_rank
    if rank is None:
        return True
    message = f"non-finite loss on rank {rank} at iteration {args.curr_iteration + 1}"
    if args.nonfinite_loss == "stop":
        raise NonFiniteLossError(
            f"{message}: stopped before the update (--nonfinite-loss stop). Lower --lr or "
            "--clip-grad, check the data there, or go on without such steps by "
            "--nonfinite-loss skip."
        )
    say(f"{message}: this step's update is skipped")
    return False
