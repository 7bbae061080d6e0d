"""Skips an update, or stops, if a loss or the gradient norm is not finite (--nonfinite-loss).

forward.py     checks this rank's loss, without waiting for it
agreement.py   tells all ranks
step.py        calls `may_update` with the norm, before the optimizer's update

A backward pass may overflow although the loss is finite, and the update would ruin every weight.
The norm is the same on all ranks, and the host reads it anyway.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from megatron_smlp.errors import NonFiniteLossError
from megatron_smlp.training.agreement import StepAgreement


def may_update(
    args: argparse.Namespace,
    agreement: StepAgreement,
    say: Callable[[str], None],
    grad_norm: float | None,
) -> bool:
    """Return whether the step's losses and gradients were finite, the same on all ranks.

    Raises:
        NonFiniteLossError: they were not, and --nonfinite-loss is stop; on every rank.
    """
    rank = agreement.read().nonfinite_rank
    if rank is not None:
        what = f"non-finite loss on rank {rank}"
    elif grad_norm is not None and not math.isfinite(grad_norm):
        what = f"gradient norm {float(grad_norm)} with a finite loss"  # a tensor with Apex
    else:
        return True
    message = f"{what} at iteration {args.curr_iteration + 1}"
    if args.nonfinite_loss == "stop":
        raise NonFiniteLossError(
            f"{message}: stopped before the update (--nonfinite-loss stop). Lower --lr or "
            "--clip-grad, check the data there, or skip such steps with --nonfinite-loss skip."
        )
    say(f"{message}: this step's update is skipped")
    return False
