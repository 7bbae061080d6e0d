"""Hold an update back where a loss or the gradients' norm is not finite: --nonfinite-loss.

forward.py     sees the loss of this rank, without waiting for it
agreement.py   tells all ranks
step.py        asks here, before the optimizer's update, and knows the norm

A backward pass may overflow under a loss that is finite, and the update would break every weight.
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
        NonFiniteLossError: on every rank, where --nonfinite-loss is stop.
    """
    rank = agreement.read().nonfinite_rank
    if rank is not None:
        what = f"non-finite loss on rank {rank}"
    elif grad_norm is not None and not math.isfinite(grad_norm):
        what = f"gradient norm {float(grad_norm)} under a finite loss"  # a tensor beside Apex
    else:
        return True
    message = f"{what} at iteration {args.curr_iteration + 1}"
    if args.nonfinite_loss == "stop":
        raise NonFiniteLossError(
            f"{message}: stopped before the update (--nonfinite-loss stop). Lower --lr or "
            "--clip-grad, check the data there, or go on without such steps by "
            "--nonfinite-loss skip."
        )
    say(f"{message}: this step's update is skipped")
    return False
