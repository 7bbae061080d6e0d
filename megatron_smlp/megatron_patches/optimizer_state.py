"""Make the saved optimizer state independent of the layout: TP, PP, EP, DP, distributed or not.

Megatron writes Adam's moments as whole tensors under the names of their parameters, if it is told
to (`--dist-ckpt-optim-fully-reshardable`). Around them it keeps what belongs to one layout, and a
resume under another one stops there. On every device:

* Parameter groups, and how many optimizers a rank chains, are written as rank 0 has them. A stage
  without experts has one optimizer, one with experts two; a distributed optimizer nests its state
  in another way than a plain one. Here they stay out of the checkpoint: groups are made of the
  run's own flags, and only the step count is saved, the largest of all ranks.
* A distributed optimizer calls its fp32 weights `param`, the plain mixed precision one
  `fp32_param`; for an fp32 model only the first saves them, a second time. Here both say
  `fp32_param`, and weights that the model holds in fp32 already are not repeated.
* A distributed optimizer gathers its buckets without the padding between them, and then looks for
  each parameter where it lies with the padding: moments behind the first bucket are saved shifted.
  A stage with a tied embedding has two buckets, and so has every overlap of communication. Here
  they are gathered with the padding.
* A plain optimizer has no moments before its first update, which fp16 puts off until its loss scale
  fits, and leaves them out; a resume asks for them. Here they are saved as the zeros that they are.
* What a plain optimizer saved does not name a format that a distributed optimizer could look for.
  Here it does.

Megatron's format for a change of the data parallel size alone (`dp_reshardable`) passes untouched.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer

from megatron_smlp.errors import UsageError
from megatron_smlp.megatron_patches import torch_adam

FORMAT = "distrib_optim_sharding_type"
ANY_LAYOUT = "fully_reshardable"
# Where Megatron would have put an optimizer of this rank's layout.
LOCAL = "of_this_layout"


def apply() -> None:
    """Replace two methods of ChainedOptimizer and two more functions, once per process."""
    if hasattr(ChainedOptimizer.sharded_state_dict, "__wrapped__"):
        return
    ChainedOptimizer.sharded_state_dict = _without_layout(ChainedOptimizer.sharded_state_dict)
    ChainedOptimizer.load_state_dict = _into_layout(ChainedOptimizer.load_state_dict)
    DistributedOptimizer.sharded_param_state_fully_reshardable = _gathered_with_padding(
        DistributedOptimizer.sharded_param_state_fully_reshardable
    )
    dist_checkpointing.load_content_metadata = _naming_the_format(
        dist_checkpointing.load_content_metadata
    )


def _naming_the_format(load: Any) -> Any:
    @functools.wraps(load)
    def wrapped(*args: Any, **kwargs: Any) -> dict[str, Any] | None:
        metadata: dict[str, Any] | None = load(*args, **kwargs)
        return metadata if metadata is None else {FORMAT: ANY_LAYOUT, **metadata}

    return wrapped


def _gathered_with_padding(original: Any) -> Any:
    """Let each bucket call its padding its own, so that parameters lie where the buffer says."""

    @functools.wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        buckets = [bucket for buffer in self.buffers for bucket in buffer.buckets]
        unpadded = [holder.numel_unpadded for holder in (*self.buffers, *buckets)]
        for buffer in self.buffers:
            buffer.numel_unpadded = buffer.numel
        for bucket in buckets:
            bucket.numel_unpadded = bucket.grad_data.numel()
        try:
            return original(self, *args, **kwargs)
        finally:
            for holder, count in zip((*self.buffers, *buckets), unpadded, strict=True):
                holder.numel_unpadded = count

    return wrapped


def _without_layout(original: Any) -> Any:
    @functools.wraps(original)
    def sharded_state_dict(self: Any, model: Any, is_loading: bool = False, **kwargs: Any) -> Any:
        if (kwargs.get("metadata") or {}).get(FORMAT, ANY_LAYOUT) != ANY_LAYOUT:
            _check_distributed(self, kwargs["metadata"][FORMAT])
            return original(self, model, is_loading, **kwargs)
        if not is_loading:
            _allocate_moments(self)
        state = original(self, model, is_loading, **kwargs)
        for optimizer, part in _parts(self, state):
            if isinstance(optimizer, DistributedOptimizer) and part["param_state"] is not None:
                _name_weights(part["param_state"], _parameters(optimizer))
        common = {} if is_loading else {"step": _step(self)} | _grad_scaler(self, state)
        return common | {LOCAL: _kept_local(state)}

    return sharded_state_dict


def _allocate_moments(optimizer: Any) -> None:
    """Allocate moments where a plain optimizer has made no update yet."""
    for one in optimizer.chained_optimizers:
        if isinstance(one, DistributedOptimizer) or one.optimizer.state:
            continue
        if isinstance(one.optimizer, torch.optim.Adam):
            torch_adam.allocate(one.optimizer)
        elif one.init_state_fn is not None:
            one.init_state_fn(one.optimizer, one.config)


def _into_layout(original: Any) -> Any:
    @functools.wraps(original)
    def load_state_dict(self: Any, state: Any) -> None:
        if LOCAL not in state:
            original(self, state)
            return
        local = state[LOCAL]
        for optimizer, part in _parts(self, local):
            _set_step(optimizer, part, state["step"])
            if "grad_scaler" in state:
                part["grad_scaler"] = state["grad_scaler"]
            if isinstance(optimizer, DistributedOptimizer):
                _restore_weights(part["param_state"], _parameters(optimizer))
        original(self, local)

    return load_state_dict


def _check_distributed(optimizer: Any, name: str) -> None:
    """Raise UsageError where a plain optimizer meets what a distributed one saved in its format."""
    if not all(isinstance(one, DistributedOptimizer) for one in optimizer.chained_optimizers):
        raise UsageError(
            f"the checkpoint's optimizer state has the format {name}, which only a run with "
            "--use-distributed-optimizer in the same tensor, pipeline and expert parallel layout "
            "can load. Resume that way and save with --optimizer-checkpoint any_layout, or give "
            "--no-load-optim."
        )


def _parts(optimizer: Any, state: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each chained optimizer with its part; a single one has no number in front."""
    chained = optimizer.chained_optimizers
    if len(chained) == 1:
        yield chained[0], state
    else:
        yield from ((one, state[number]) for number, one in enumerate(chained))


def _parameters(optimizer: DistributedOptimizer) -> list[torch.Tensor]:
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
    """Return the same tree with everything but sharded tensors marked as not to be saved."""
    if isinstance(state, ShardedBase | LocalNonpersistentObject):
        return state
    if isinstance(state, dict | list) and _has_sharded(state):
        if isinstance(state, dict):
            return {key: _kept_local(value) for key, value in state.items()}
        return [_kept_local(value) for value in state]
    return LocalNonpersistentObject(_unwrapped(state))


def _has_sharded(state: Any) -> bool:
    return any(isinstance(value, ShardedBase) for value in nested_values(state))


def _unwrapped(state: Any) -> Any:
    """Return the same tree without the marks that Megatron itself set inside."""
    if isinstance(state, LocalNonpersistentObject):
        return state.unwrap()
    if isinstance(state, dict):
        return {key: _unwrapped(value) for key, value in state.items()}
    return [_unwrapped(value) for value in state] if isinstance(state, list) else state


def _step(optimizer: Any) -> int:
    """Return the steps taken, which a rank or group without parameters of its own does not know."""
    steps = [0]
    for one in optimizer.chained_optimizers:
        inner = one.optimizer
        found = [*inner.param_groups, *inner.state.values()]
        steps += [int(holder["step"]) for holder in found if holder.get("step") is not None]
    largest = torch.tensor(max(steps), device=torch.cuda.current_device())
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return int(largest)


def _set_step(optimizer: Any, part: dict[str, Any], step: int) -> None:
    inner = part.get("optimizer", part)
    if isinstance(optimizer, DistributedOptimizer) or distrib_optimizer.HAVE_APEX_OR_TE:
        for group in inner["param_groups"]:
            group["step"] = step
    else:
        inner["state"]["common_step"] = torch.tensor(float(step))


def _grad_scaler(optimizer: Any, state: Any) -> dict[str, Any]:
    """Return fp16's loss scale and its counters, which all chained optimizers share."""
    found = [part["grad_scaler"] for _, part in _parts(optimizer, state) if "grad_scaler" in part]
    return {"grad_scaler": found[0]} if found else {}
