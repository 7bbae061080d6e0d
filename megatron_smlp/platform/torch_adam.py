"""Lets Megatron's distributed optimizer resume with torch's Adam, where Apex is not installed.

Megatron asks the optimizer for its state before it loads a checkpoint into it, and takes the step
count from there. Apex's and Transformer Engine's Adam keep that count in the parameter groups;
torch's keeps it beside each parameter, and allocates it at the first step only. A new optimizer has
none, and `assert len(steps) == 1` ends every resume. Here the state is allocated before it is asked
for, as the first step would do it: zeros, at step 0. The load then fills it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def needed() -> bool:
    """True where Megatron falls back to torch's optimizers."""
    return not distrib_optimizer.HAVE_APEX_OR_TE


def apply() -> None:
    """Replace `DistributedOptimizer.state_dict`, once per process."""
    original = DistributedOptimizer.state_dict
    if not needed() or hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def state_dict(self: Any) -> Any:
        if isinstance(self.optimizer, torch.optim.Adam) and not self.optimizer.state:
            allocate(self.optimizer)
        return original(self)

    DistributedOptimizer.state_dict = state_dict


def allocate(optimizer: torch.optim.Adam) -> None:
    """Give every parameter the state that torch's Adam would give it at its first step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.tensor(0.0, dtype=torch.float32),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
