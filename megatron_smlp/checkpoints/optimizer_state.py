"""Save optimizer state independent of the layout: TP, PP, EP, DP, distributed or not.

With `--dist-ckpt-optim-fully-reshardable` Megatron writes Adam's moments as whole tensors under the
names of their parameters. What it saves around them belongs to one layout, and a resume under
another one fails there. On every device:

* Megatron writes parameter groups, and how many optimizers a rank chains, as rank 0 has them. But a
  stage without experts has one optimizer, one with experts two, and a distributed optimizer nests
  its state differently from a plain one. Here they stay out of the checkpoint: groups are built
  from the run's own flags, and only the step count is saved, the maximum over all ranks.
* A distributed optimizer calls its fp32 weights `param`, a plain mixed precision one `fp32_param`;
  for an fp32 model only the former saves them, a second time. Here both say `fp32_param`, and
  weights that the model already holds in fp32 are not saved again.
* A plain optimizer has no moments before its first update, which fp16 puts off until its loss scale
  fits, and so omits them; a resume expects them. Here they are saved, as zeros.
* The state that a plain optimizer saves does not name the format that a distributed optimizer looks
  for; it is taken to be ANY_LAYOUT.

Megatron's format for changing the data parallel size alone (`dp_reshardable`) passes through as it
is, except for the groups: there too a load uses the run's own, with the step that was saved.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, nested_values
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_smlp.collectives import gathered

FORMAT = "distrib_optim_sharding_type"
ANY_LAYOUT = "fully_reshardable"
# Key of the state as Megatron nests it for this rank's layout.
LOCAL = "of_this_layout"


class AnyLayout:
    """Wrap Megatron's optimizer for `generate_state_dict`; see the module docstring.

    Args:
        optimizer: a ChainedOptimizer, as Megatron builds it.
    """

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.is_stub_optimizer: bool = optimizer.is_stub_optimizer

    def sharded_state_dict(
        self, model: Any, is_loading: bool = False, *, metadata: dict[str, Any]
    ) -> Any:
        """Return what to save or load; model: the model's sharded state. Collective."""
        if metadata.get(FORMAT, ANY_LAYOUT) != ANY_LAYOUT:
            return self.optimizer.sharded_state_dict(model, is_loading, metadata=metadata)
        if not is_loading:
            _allocate_moments(self.optimizer)
        state = self.optimizer.sharded_state_dict(model, is_loading, metadata=metadata)
        for optimizer, part in _parts(self.optimizer, state):
            if isinstance(optimizer, DistributedOptimizer) and part["param_state"] is not None:
                _name_weights(part["param_state"], model_parameters(optimizer))
        common = {} if is_loading else self._common(state)
        return common | {LOCAL: _kept_local(state)}

    def _common(self, state: Any) -> dict[str, Any]:
        """Return what all chained optimizers share: the step, fp16's loss scale and counters."""
        common: dict[str, Any] = {"step": _step(self.optimizer)}
        for _, part in _parts(self.optimizer, state):
            if "grad_scaler" in part:
                common.setdefault("grad_scaler", part["grad_scaler"])
        return common

    def load_state_dict(self, state: Any) -> None:
        """Load `state`: what `sharded_state_dict` returned, filled in from a checkpoint."""
        if LOCAL not in state:
            for optimizer, part in _parts(self.optimizer, state):
                _set_own_groups(optimizer, part["optimizer"])
            self.optimizer.load_state_dict(state)
            return
        local = state[LOCAL]
        for optimizer, part in _parts(self.optimizer, local):
            _set_step(optimizer, part, state["step"])
            if "grad_scaler" in state:
                part["grad_scaler"] = state["grad_scaler"]
            if isinstance(optimizer, DistributedOptimizer):
                _restore_weights(part["param_state"], model_parameters(optimizer))
        self.optimizer.load_state_dict(local)


def allocate(optimizer: torch.optim.Adam) -> None:
    """Create for every parameter the state that torch's Adam would create at its first step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def _allocate_moments(optimizer: Any) -> None:
    """Allocate the moments of optimizers that have made no update yet; those of Transformer Engine
    and Apex would do it in the first."""
    for part in optimizer.chained_optimizers:
        if part.optimizer is None or any(part.optimizer.state.values()):
            continue
        if isinstance(part.optimizer, torch.optim.Adam):
            if not isinstance(part, DistributedOptimizer):  # torch_adam.py does it for those
                allocate(part.optimizer)
        elif part.init_state_fn is not None:
            part.init_state_fn(part.optimizer, part.config)


def _parts(optimizer: Any, state: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each chained optimizer with its part of the state; a single one has no number key."""
    chained = optimizer.chained_optimizers
    if len(chained) == 1:
        yield chained[0], state
    else:
        yield from ((part, state[number]) for number, part in enumerate(chained))


def model_parameters(optimizer: DistributedOptimizer) -> list[torch.Tensor]:
    """Return the model's parameters in the order in which Megatron numbers their states."""
    return [parameter for buffer in optimizer.buffers for parameter in buffer.param_index_map]


def _name_weights(states: dict[int, Any], parameters: list[torch.Tensor]) -> None:
    for number, parameter in enumerate(parameters):
        weights = states[number].pop("param")
        if parameter.dtype != torch.float32:
            key = weights.key.replace("optimizer.state.param.", "optimizer.state.fp32_param.", 1)
            states[number]["fp32_param"] = dataclasses.replace(weights, key=key)


def _restore_weights(states: dict[int, Any], parameters: list[torch.Tensor]) -> None:
    """Fill in an fp32 model's weights, loaded before its optimizer; Megatron copies them again."""
    for number, parameter in enumerate(parameters):
        states[number].setdefault("fp32_param", parameter.detach())


def _kept_local(state: Any) -> Any:
    """Return the tree with everything but sharded tensors marked as not to be saved."""
    if isinstance(state, ShardedBase | LocalNonpersistentObject):
        return state
    if isinstance(state, dict | list) and _has_sharded(state):
        if isinstance(state, dict):
            return {key: _kept_local(value) for key, value in state.items()}
        return [_kept_local(value) for value in state]
    unwrapped = dict_list_map_outplace(  # removes the marks that Megatron itself set inside
        lambda v: v.unwrap() if isinstance(v, LocalNonpersistentObject) else v, state
    )
    return LocalNonpersistentObject(unwrapped)


def _has_sharded(state: Any) -> bool:
    return any(isinstance(value, ShardedBase) for value in nested_values(state))


def _step(optimizer: Any) -> int:
    """Return the steps taken, as the maximum over ranks: some have no parameters of their own."""
    steps = [0]
    for part in optimizer.chained_optimizers:
        holders = [*part.optimizer.param_groups, *part.optimizer.state.values()]
        steps += [int(holder["step"]) for holder in holders if holder.get("step") is not None]
    return max(gathered(max(steps)))


def _set_own_groups(optimizer: Any, saved: dict[str, Any]) -> None:
    """Keep only the step of saved groups: Megatron cannot match groups whose rates have changed."""
    steps = [group["step"] for group in saved["param_groups"] if group.get("step") is not None]
    step = {"step": max(steps)} if steps else {}
    own = optimizer.state_dict()["optimizer"]["param_groups"]
    saved["param_groups"] = [group | step for group in own]


def _set_step(optimizer: Any, part: dict[str, Any], step: int) -> None:
    inner = part.get("optimizer", part)
    if isinstance(optimizer, DistributedOptimizer) or distrib_optimizer.HAVE_APEX_OR_TE:
        for group in inner["param_groups"]:
            group["step"] = step
    else:
        inner["state"]["common_step"] = torch.tensor(float(step))
