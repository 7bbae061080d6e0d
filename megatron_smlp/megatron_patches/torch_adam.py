"""torch's Adam inside Megatron, for when Apex and Transformer Engine are not installed.

This makes it run as torch's fused kernel, one pass over each parameter with its gradient and
moments. Megatron does not request that: its loop takes seven passes and seven temporaries.

It also lets Megatron's distributed optimizer resume. Apex's and Transformer Engine's Adam keep the
step count in the parameter groups; torch's keeps it in each parameter's state, as a tensor that the
first step allocates. Without the patches, five things go wrong:

* Megatron reads the optimizer's state, with the step count, before it loads a checkpoint into it. A
  new optimizer has none, and `assert len(steps) == 1` ends the resume. Here the state is allocated
  beforehand, as the first step would do: zeros, at step 0.
* With few experts and many data parallel ranks, a rank may hold no part of any parameter: it has no
  step count at all and fails the same assertion. Here it reports 0.
* Megatron loads the same step tensor for every parameter. Adam increments it in place once per
  parameter, so that the count runs away after a resume. Here each parameter gets its own.
* If the step count is a tensor, Megatron looks for it among a parameter's loaded moments, where the
  format for any layout has none. Here Megatron skips it.
* In fp32 the optimizer's parameters are views of the model's; loading copies into them in place,
  which autograd refuses. Here loading runs under `torch.no_grad`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_smlp.checkpoints.optimizer_state import allocate


def needed() -> bool:
    """Return whether Megatron falls back to torch's optimizers."""
    return not distrib_optimizer.HAVE_APEX_OR_TE


def apply() -> None:
    """Replace three methods of DistributedOptimizer, once per process."""
    if not needed() or hasattr(DistributedOptimizer.state_dict, "__wrapped__"):
        return
    give, take = DistributedOptimizer.state_dict, DistributedOptimizer.load_state_dict
    put = DistributedOptimizer._set_main_param_and_optimizer_states

    @functools.wraps(give)
    def state_dict(self: Any) -> Any:
        if isinstance(self.optimizer, torch.optim.Adam) and not self.optimizer.state:
            allocate(self.optimizer)
            if not self.optimizer.state:
                return _empty_state(self)
        return give(self)

    @functools.wraps(take)
    def load_state_dict(self: Any, loaded: Any) -> None:
        with torch.no_grad():
            take(self, loaded)
        if isinstance(self.optimizer, torch.optim.Adam):
            step = float(loaded["optimizer"]["param_groups"][0]["step"])
            for parameter, state in self.optimizer.state.items():
                state["step"] = torch.tensor(step, device=parameter.device)

    @functools.wraps(put)
    def set_states(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        put(self, model_param, {"step": None, **tensors})

    DistributedOptimizer._set_main_param_and_optimizer_states = set_states
    DistributedOptimizer.state_dict = state_dict
    DistributedOptimizer.load_state_dict = load_state_dict


def fuse_steps(optimizer: Any) -> None:
    """Make each optimizer of Megatron's chain run torch's Adam as the fused kernel."""
    for part in optimizer.chained_optimizers:
        if isinstance(inner := part.optimizer, torch.optim.Adam):
            inner.register_step_pre_hook(_choose_fused)


def _choose_fused(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    # At each step, since loading a checkpoint restores the flags of the run that saved it, and
    # leaves the step counts on the CPU, where CUDA's fused kernel cannot read them.
    for group in optimizer.param_groups:
        group["fused"], group["foreach"] = True, False
        for parameter in group["params"]:
            state = optimizer.state.get(parameter)
            if state and state["step"].device != parameter.device:
                state["step"] = state["step"].to(parameter.device)


def _empty_state(optimizer: Any) -> dict[str, Any]:
    """Return what Megatron's own `state_dict` should, for groups that are all empty."""
    inner = optimizer.optimizer.state_dict()
    groups = [
        {name: value for name, value in group.items() if name != "params"} | {"step": 0}
        for group in inner["param_groups"]
    ]
    scaler = optimizer.grad_scaler
    return {"optimizer": {"param_groups": groups}} | (
        {"grad_scaler": scaler.state_dict()} if scaler else {}
    )
