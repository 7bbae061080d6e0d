"""Resuming in another layout replaces parts of Megatron: they exist, and still need replacing."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from support.in_process import build_model

from megatron_smlp.checkpoints.optimizer_state import (
    ANY_LAYOUT,
    FORMAT,
    AnyLayout,
    model_parameters,
)
from megatron_smlp.megatron_patches import torch_adam

pytestmark = pytest.mark.usefixtures("megatron")

MODEL = "--architecture smlp --num-dense-layers 2 --token-router base --num-experts 2"


@pytest.fixture
def optimizer(parse: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Return a builder of (Megatron's optimizer of a small model, the model's sharded tensors)."""

    def build(
        *, distributed: bool, bf16: bool = False, bucket_size: int | None = None
    ) -> tuple[ChainedOptimizer, Any]:
        args = parse(f"{MODEL} {'--bf16' if bf16 else ''}")
        model = build_model(args)
        if bf16:
            model = model.bfloat16()
        wrapped = DistributedDataParallel(
            model.config,
            DistributedDataParallelConfig(
                use_distributed_optimizer=distributed,
                overlap_grad_reduce=bucket_size is not None,
                bucket_size=bucket_size,
            ),
            model,
        )
        config = OptimizerConfig(
            optimizer="adam", lr=1e-3, bf16=bf16, use_distributed_optimizer=distributed
        )
        return get_megatron_optimizer(config, [wrapped]), model.sharded_state_dict()

    return build


def saved(optimizer: ChainedOptimizer, model: Any) -> dict[str, Any]:
    """Return everything that goes into a checkpoint."""
    state = AnyLayout(optimizer).sharded_state_dict(model, metadata={FORMAT: ANY_LAYOUT})
    tensors = {value.key for value in nested_values(state) if isinstance(value, ShardedBase)}
    rest = {
        name: value
        for name, value in state.items()
        if not any(
            isinstance(leaf, ShardedBase | LocalNonpersistentObject)
            for leaf in nested_values({name: value})
        )
    }
    return {"tensors": tensors, "rest": rest}


@pytest.mark.parametrize("bf16", [False, True])
def test_plain_and_distributed_optimizers_save_the_same_names(
    optimizer: Callable[..., Any], bf16: bool
) -> None:
    plain, plain_model = optimizer(distributed=False, bf16=bf16)
    for one in plain.chained_optimizers:  # a plain one has no moments before its first step
        torch_adam.allocate(one.optimizer)
    distributed = saved(*optimizer(distributed=True, bf16=bf16))
    assert saved(plain, plain_model) == distributed
    kinds = {name.split(".")[2] for name in distributed["tensors"]}
    assert kinds == {"exp_avg", "exp_avg_sq"} | ({"fp32_param"} if bf16 else set())
    assert distributed["rest"] == {"step": 0}


def test_the_step_is_saved_once(optimizer: Callable[..., Any]) -> None:
    built, model = optimizer(distributed=False)
    for one in built.chained_optimizers:
        torch_adam.allocate(one.optimizer)
        for state in one.optimizer.state.values():
            state["step"] += 7
    assert saved(built, model)["rest"] == {"step": 7}


def test_megatron_looks_for_the_step_among_the_loaded_moments(
    optimizer: Callable[..., Any],
) -> None:
    """The original, which we wrap, fails; once it no longer does, the wrapper can go."""
    built, _ = optimizer(distributed=True)
    one = built.chained_optimizers[0]
    torch_adam.allocate(one.optimizer)
    parameter = next(iter(one.buffers[0].param_index_map))
    original = DistributedOptimizer._set_main_param_and_optimizer_states.__wrapped__
    moments = {name: torch.zeros(parameter.numel()) for name in ("param", "exp_avg", "exp_avg_sq")}
    with torch.no_grad():
        with pytest.raises(KeyError, match="step"):
            original(one, parameter, moments)
        one._set_main_param_and_optimizer_states(parameter, moments)


def test_a_rank_without_parameters_has_a_state(optimizer: Callable[..., Any]) -> None:
    """Megatron's `assert len(steps) == 1` would find no steps there and fail."""
    built, _ = optimizer(distributed=True)
    one = built.chained_optimizers[0]
    for group in one.optimizer.param_groups:
        group["params"].clear()
    with pytest.raises(AssertionError):
        DistributedOptimizer.state_dict.__wrapped__(one)
    groups = one.state_dict()["optimizer"]["param_groups"]
    assert groups
    assert all(group["step"] == 0 and "params" not in group for group in groups)


def test_states_are_loaded_by_place() -> None:
    for kind in (ChainedOptimizer, DistributedOptimizer):
        assert list(inspect.signature(kind.load_state_dict).parameters) == ["self", "state_dict"]


def saved_as_they_are(optimizer: Callable[..., Any], *, by_megatron: bool) -> bool:
    """Return whether an optimizer of several buckets saves each parameter with its own values."""
    chained, model = optimizer(distributed=True, bucket_size=1000)
    inner = chained.chained_optimizers[0]
    assert len(inner.buffers[0].buckets) > 2
    inner._init_optimizer_states_with_dummy_values()
    give = DistributedOptimizer.sharded_param_state_fully_reshardable
    states = (give.__wrapped__ if by_megatron else give)(inner, model, metadata={})
    return all(
        torch.equal(states[number]["param"].data.flatten(), parameter.detach().flatten())
        for number, parameter in enumerate(model_parameters(inner))
    )


def test_parameters_are_saved_with_their_own_values(optimizer: Callable[..., Any]) -> None:
    assert saved_as_they_are(optimizer, by_megatron=False)


def test_megatrons_own_function_loses_padding(optimizer: Callable[..., Any]) -> None:
    """The original, which we wrap; once it no longer does, `_gathered_with_padding` can go."""
    assert not saved_as_they_are(optimizer, by_megatron=True)
