"""Faults on the device's side only, each with the cases that must fail with it.

    PYTHONPATH=tests:. python -m support.first_gpu --sabotage gate-zero [--device cpu]

A comparison that has never failed may compare nothing. Processes that a case starts inherit the
variable; references are made without it. The product knows nothing of these faults.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

VARIABLE = "FIRST_GPU_SABOTAGE"

type Wrapper = tuple[Any, str, Callable[[Any], Any]]
"""An owner, the name of its attribute, and what wraps the attribute."""


@dataclass(frozen=True)
class Sabotage:
    """A fault, as `wrapped_in` takes it, and the cases that must not pass with it."""

    wrappers: Callable[[], Sequence[Wrapper]]
    cases: tuple[str, ...]


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Break what VARIABLE names for the duration of a block, once everything is imported."""
    from megatron_smlp.megatron_patches.wrapping import wrapped_in

    name = os.environ.get(VARIABLE)
    with wrapped_in(*(SABOTAGES[name].wrappers() if name else ())):
        yield


def _afterwards(change: Callable[..., Any]) -> Callable[[Any], Any]:
    """Make a wrapper that returns `change(result, *arguments)` in place of the result."""

    def wrap(function: Any) -> Any:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return change(function(*args, **kwargs), *args)

        return wrapped

    return wrap


def _instead(other: Any) -> Callable[[Any], Any]:
    return lambda _: other


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _unprobed() -> Wrapper:
    """Skip the check for layers that read ahead, which would keep a training from starting."""
    from megatron_smlp.training import loop

    return (loop, "check_causality", _instead(_nothing))


def _gate_zero() -> list[Wrapper]:
    """M is zero, with the gradients that follow from it."""
    from megatron_smlp.layers.spatial_gating import SpatialGating
    from megatron_smlp.ops import gated_mix_launches

    def without(gate: Any) -> Any:
        return lambda u1, values, weight, *others: gate(u1, values, weight * 0, *others)

    zero = _afterwards(lambda result, *_: (result[0] * 0, result[1]))
    return [(SpatialGating, "spatial_parameters", zero), (gated_mix_launches, "gate", without)]


def _gate_ahead() -> list[Wrapper]:
    """The product reads all of M, above the diagonal too."""
    from megatron_smlp.layers import spatial_gating

    def dense(weight: Any, values: Any) -> Any:
        return weight.to(values.dtype) @ values

    by_parts = _instead(lambda *_: False)
    return [
        _unprobed(),
        (spatial_gating, "causal_mix", _instead(dense)),
        (spatial_gating, "gates_by_kernels", by_parts),
    ]


def _attention_ahead() -> list[Wrapper]:
    """Every token sees the whole sequence."""
    from torch.nn import functional

    from megatron_smlp.layers import attention, tiny_attention

    def attend(query: Any, key: Any, value: Any, **_: Any) -> Any:
        return functional.scaled_dot_product_attention(query, key, value)

    attentions = [(module, "attend", _instead(attend)) for module in (attention, tiny_attention)]
    return [_unprobed(), *attentions]


def _expert_swapped() -> list[Wrapper]:
    """Two of the experts get each other's tokens."""
    from torch import nn

    from megatron_smlp.layers.token_moe import Experts

    def swapped(forward: Any) -> Any:
        def wrapped(self: Any, *args: Any) -> Any:
            experts = self.local_experts
            self.local_experts = nn.ModuleList([experts[1], experts[0], *experts[2:]])
            try:
                return forward(self, *args)
            finally:
                self.local_experts = experts

        return wrapped

    return [(Experts, "forward", swapped)]


def _prefix_shifted() -> list[Wrapper]:
    """Partial prediction's prefix is a token longer."""
    from megatron_smlp.layers.feature_moe import PartialFeatureMoE
    from megatron_smlp.ops import gated_mix_launches

    def longer(_: Any, layer: Any, *__: Any) -> None:
        layer.prefix_length += 1

    def shifted(gate: Any) -> Any:
        def wrapped(*args: Any) -> Any:
            *others, experts, scales, prefix = args
            return gate(*others, experts, scales, prefix if experts is None else prefix + 1)

        return wrapped

    return [
        (PartialFeatureMoE, "__init__", _afterwards(longer)),
        (gated_mix_launches, "gate", shifted),
    ]


def _grad_scaled() -> list[Wrapper]:
    """The gradient of M is larger by a quarter."""
    from megatron_smlp.layers.spatial_gating import SpatialGating
    from megatron_smlp.ops import gated_mix_launches

    def scaled(result: Any, *_: Any) -> Any:
        weight = result[0].view_as(result[0])
        if weight.requires_grad:
            weight.register_hook(lambda gradient: gradient * 1.25)
        return weight, result[1]

    larger = _afterwards(lambda result, *_: (result[0] * 1.25, result[1]))
    return [
        (SpatialGating, "spatial_parameters", _afterwards(scaled)),
        (gated_mix_launches, "gradients_of_weights", larger),
    ]


def _unbalanced() -> list[Wrapper]:
    """Every token gets the expert that it prefers."""
    import torch

    from megatron_smlp.ops import balanced_assignment
    from megatron_smlp.routers import base

    def greedy(scores: Any) -> Any:
        return scores.argmax(dim=-1), torch.zeros(scores.shape[1], device=scores.device)

    return [
        (module, "priced_assignment", _instead(greedy)) for module in (balanced_assignment, base)
    ]


def _micro_batch_lost() -> list[Wrapper]:
    """Of two micro-batches, the first adds no gradients."""
    from megatron.core.pipeline_parallel import schedules

    calls = 0

    def losing(backward: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return backward(*args, **kwargs) if calls % 2 == 0 else None

        return wrapped

    return [(schedules, "backward_step", losing)]


def _sum_dropped() -> list[Wrapper]:
    """Ranks of a model parallel group keep partial gradients that should be summed."""
    import importlib

    finalize = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    sums = ("_allreduce_non_tensor_model_parallel_grads", "_allreduce_word_embedding_grads")
    return [(finalize, name, _instead(_nothing)) for name in sums]


def _replica_dropped() -> list[Wrapper]:
    """Data parallel ranks keep the gradients of their own samples."""
    from megatron.core.distributed import param_and_grad_buffer as buffers

    return [(buffers, "dist_reduce_scatter_func", _instead(_nothing))]


def _token_displaced() -> list[Wrapper]:
    """Tokens come back from the ranks of other experts shifted by one."""
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    from megatron_smlp.layers.token_dispatch import TopOneDispatcher

    late = _afterwards(lambda result, *_: result.roll(1, 0))
    return [
        (kind, "token_combine", late) for kind in (TopOneDispatcher, MoEAlltoAllTokenDispatcher)
    ]


def _moments_lost() -> list[Wrapper]:
    """A resumed run has no first moments."""
    from megatron_smlp.checkpoints.optimizer_state import AnyLayout

    def forget(_: Any, state: Any, *__: Any) -> None:
        for part in state.optimizer.chained_optimizers:
            for moments in part.optimizer.state.values():
                moments["exp_avg"].zero_()

    return [(AnyLayout, "load_state_dict", _afterwards(forget))]


def _draws_lost() -> list[Wrapper]:
    """A resumed run draws the random numbers of its start again."""
    from megatron_smlp.checkpoints import state

    return [(state, "_set_rng", _instead(_nothing))]


GATED = ("train_gmlp", "train_amlp", "train_smlp_deterministic", "train_smlp_partial")
SABOTAGES = {
    "gate-zero": Sabotage(_gate_zero, (*GATED, "kernels")),
    "gate-ahead": Sabotage(_gate_ahead, GATED),
    "attention-ahead": Sabotage(_attention_ahead, ("train_transformer", "train_amlp")),
    "expert-swapped": Sabotage(
        _expert_swapped, ("train_gshard", "train_switch", "train_base", "train_hash", *GATED[2:])
    ),
    "prefix-shifted": Sabotage(_prefix_shifted, ("train_smlp_partial", "kernels")),
    "grad-scaled": Sabotage(_grad_scaled, (*GATED, "kernels")),
    "unbalanced": Sabotage(_unbalanced, ("train_base", *GATED[2:], "operators")),
    "micro-batch-lost": Sabotage(
        _micro_batch_lost, ("train_transformer", "train_gmlp", "pp2_interleaved")
    ),
    "moments-lost": Sabotage(_moments_lost, ("train_gmlp", "async_save")),
    "draws-lost": Sabotage(_draws_lost, ("dropout",)),
    "sum-dropped": Sabotage(_sum_dropped, ("tp2", "pp2")),
    "token-displaced": Sabotage(_token_displaced, ("ep2", "tp2_ep2", "ep8", "ep8_uneven")),
    "replica-dropped": Sabotage(_replica_dropped, ("dp2",)),
}
