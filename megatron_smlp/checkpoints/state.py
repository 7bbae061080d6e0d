"""Write a training's state to a checkpoint's folder, and read it back, as Megatron's state dicts.

It is saved as named shards that any layout can read back (`megatron.core`'s distributed
checkpointing): weights, optimizer state, schedule, RNG states, and the run's arguments with the
samples that it has read. --optimizer-checkpoint sets the format of a distributed optimizer's state.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import torch
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    TorchDistLoadShardedStrategy,
    TorchDistSaveShardedStrategy,
)
from megatron.core.dist_checkpointing.utils import _clean_metadata_for_serialization
from megatron.core.num_microbatches_calculator import update_num_microbatches
from megatron.core.utils import unwrap_model
from megatron.training.checkpointing import (
    _build_sharded_state_dict_metadata,
    generate_state_dict,
    get_rng_state,
    set_checkpoint_version,
    set_loaded_iteration,
)
from megatron.training.training import preprocess_common_state_dict
from torch.distributed.checkpoint import CheckpointException

from megatron_smlp.checkpoints.folders import RELEASE
from megatron_smlp.checkpoints.optimizer_state import ANY_LAYOUT, FORMAT, AnyLayout
from megatron_smlp.command_line import flag_of
from megatron_smlp.errors import UsageError
from megatron_smlp.first_rank import await_all_ranks


class Trained(Protocol):
    """The parts of a training that are saved and loaded."""

    args: argparse.Namespace
    model: list[Any]
    optimizer: Any
    schedule: Any
    groups: Any


def write(parts: Trained, folder: Path, *, iteration: int, cache: dict[str, Any]) -> Any:
    """Write a training's state to an existing folder. Collective.

    Args:
        cache: shared by this run's saves, for --ckpt-assume-constant-structure.

    Returns:
        with --async-save, Megatron's request that writes the files; else None.
    """
    args = parts.args
    metadata = _build_sharded_state_dict_metadata(args, dp_cp_group=parts.groups.dp_cp)
    state = _state(parts, metadata, rng=_rng(parts), iteration=iteration)
    validates = not ("saved" in cache and args.ckpt_assume_constant_structure)  # the first save
    return dist_checkpointing.save(
        state,
        str(folder),
        _strategy(parts, cache),
        async_sharded_save=args.async_save,
        validate_access_integrity=validates,
        preprocess_common_before_consistancy_check=preprocess_common_state_dict,
        content_metadata=_clean_metadata_for_serialization(metadata),
        async_strategy=args.async_strategy,
        verify_integrity=args.verify_integrity,
    )


def _strategy(parts: Trained, cache: dict[str, Any]) -> Any:
    args = parts.args
    if "saved" in cache:
        return cache["saved"]
    strategy: Any = TorchDistSaveShardedStrategy()
    if args.ckpt_assume_constant_structure:
        strategy.use_cached_ckpt_structure = True
        strategy.thread_count = args.dist_ckpt_workers if args.async_save else 1
    if args.ckpt_fully_parallel_save:
        strategy = FullyParallelSaveStrategyWrapper(
            strategy,
            _sharing(parts, args.ckpt_fully_parallel_save_process_group),
            args.ckpt_assume_constant_structure,
        )
    cache["saved"] = strategy
    return strategy


def _sharing(parts: Trained, name: str) -> Any:
    """Return the process group that shares the work on shards that all its ranks hold."""
    return parts.groups.expt_dp if name == "ep_dp" else parts.groups.dp_cp


def _rng(parts: Trained) -> Any:
    groups = parts.groups
    return get_rng_state(
        "torch_dist", groups.tp, groups.pp, dp_cp_group=groups.dp_cp, dp_group=groups.dp
    )


def _state(
    parts: Trained,
    metadata: dict[str, Any],
    *,
    rng: Any,
    iteration: int | None = None,
    with_optimizer: bool = True,
) -> dict[str, Any]:
    """Return the state to save or, without an iteration, the state for a load to fill."""
    is_loading, optimizer, args = iteration is None, None, parts.args
    if is_loading:  # --no-save-optim and --no-save-rng are about this run's saves, not its load
        args = argparse.Namespace(**{**vars(args), "no_save_optim": False, "no_save_rng": False})
    if with_optimizer and parts.optimizer is not None:
        optimizer = AnyLayout(parts.optimizer)
    state: dict[str, Any] = generate_state_dict(
        args,
        unwrap_model(parts.model),
        optimizer,
        parts.schedule if with_optimizer else None,
        rng,
        iteration=iteration,
        optim_sd_kwargs={"metadata": metadata} | ({"is_loading": True} if is_loading else {}),
        model_sd_kwargs={"metadata": metadata},
    )
    return state


def read(parts: Trained, folder: Path) -> int:
    """Load the checkpoint in a folder, and continue its counters. Collective.

    With --finetune, or from a release, only weights are loaded.

    Returns:
        its iteration; 0 if only weights were loaded.

    Raises:
        UsageError: its optimizer state does not fit this run.
    """
    args = parts.args
    common = dist_checkpointing.load_common_state_dict(str(folder))
    saved = common.get("args") or argparse.Namespace()
    goes_on = not args.finetune and "iteration" in common and folder.name != RELEASE
    same_layout = _layout(saved) == _layout(args)
    content = dist_checkpointing.load_content_metadata(preloaded_state_dict=common) or {}
    metadata = {FORMAT: ANY_LAYOUT} | content | {"dp_cp_group": parts.groups.dp_cp}
    has_optimizer = parts.optimizer is not None and not getattr(saved, "no_save_optim", False)
    with_optimizer = goes_on and has_optimizer and not args.no_load_optim
    if with_optimizer:
        is_same = same_layout and _expert_layout(saved) == _expert_layout(args)
        _check_optimizer(args, metadata[FORMAT], same_layout=is_same)
    has_rng = same_layout and not getattr(saved, "no_save_rng", False)
    with_rng = goes_on and has_rng and not args.no_load_rng
    wanted = _state(
        parts, metadata, rng=_rng(parts) if with_rng else None, with_optimizer=with_optimizer
    )
    try:
        state = dist_checkpointing.load(
            wanted,
            str(folder),
            _loading_strategy(parts),
            validate_access_integrity=args.ckpt_load_validate_sharding_integrity,
            strict=args.dist_ckpt_strictness,
            verify_integrity=args.verify_integrity,
        )
    except CheckpointException as error:
        changed = [
            name for name in OF_OPTIMIZER if getattr(saved, name, None) != getattr(args, name)
        ]
        if not (with_optimizer and changed):
            raise
        flags = ", ".join(map(flag_of, changed))
        raise UsageError(
            f"the optimizer state in {folder} does not fit this run, which has different values of "
            f"{flags}: give those of the run that saved it, or --no-load-optim."
        ) from error
    await_all_ranks(args.rank)  # on a busy file system, ranks end their reading minutes apart
    set_checkpoint_version(state.get("checkpoint_version", 0))
    iteration = int(common["iteration"]) if goes_on else 0
    set_loaded_iteration(iteration)
    if not args.finetune:
        _count_on(args, saved)
    _put(parts, state, with_optimizer=with_optimizer)
    if with_rng:
        _set_rng(state["rng_state"][0])
    torch.distributed.barrier()
    torch.cuda.empty_cache()
    return iteration


OF_OPTIMIZER = (
    *("optimizer", "bf16", "fp16", "use_distributed_optimizer"),
    *("overlap_grad_reduce", "ddp_bucket_size", "ddp_num_buckets"),
)
"""Flags on which the form of optimizer state depends."""


def read_weights(args: argparse.Namespace, model: list[Any], groups: Any, folder: Path) -> None:
    """Load only weights; model: this rank's chunks. Collective."""
    weights: Any = SimpleNamespace(
        args=args, model=model, groups=groups, optimizer=None, schedule=None
    )
    read(weights, folder)


def _layout(args: argparse.Namespace) -> tuple[int, int]:
    return (
        getattr(args, "tensor_model_parallel_size", 1),
        getattr(args, "pipeline_model_parallel_size", 1),
    )


def _expert_layout(args: argparse.Namespace) -> tuple[int, int]:
    tensor = getattr(args, "expert_tensor_parallel_size", None)
    return (
        getattr(args, "expert_model_parallel_size", 1),
        _layout(args)[0] if tensor is None else tensor,
    )


def _check_optimizer(args: argparse.Namespace, kind: str, *, same_layout: bool) -> None:
    if kind != ANY_LAYOUT and not (args.use_distributed_optimizer and same_layout):
        raise UsageError(
            f"the checkpoint's optimizer state has the format {kind}, which only a run with "
            "--use-distributed-optimizer in the same tensor, pipeline and expert parallel layout "
            "can load. Resume that way and save with --optimizer-checkpoint any_layout, or give "
            "--no-load-optim."
        )


def _loading_strategy(parts: Trained) -> Any:
    args = parts.args
    strategy = TorchDistLoadShardedStrategy(cache_metadata=args.ckpt_assume_constant_structure)
    if not args.ckpt_fully_parallel_load:
        return strategy
    return FullyParallelLoadStrategyWrapper(
        strategy,
        _sharing(parts, args.ckpt_fully_parallel_load_process_group),
        exchange_algo=args.ckpt_fully_parallel_load_exchange_algo,
    )


def _count_on(args: argparse.Namespace, saved: argparse.Namespace) -> None:
    samples = ("consumed_train_samples", "skipped_train_samples", "consumed_valid_samples")
    for name in (*samples, "unsent_flops"):
        setattr(args, name, getattr(saved, name, 0))
    update_num_microbatches(consumed_samples=args.consumed_train_samples, verbose=True)


def _put(parts: Trained, state: dict[str, Any], *, with_optimizer: bool) -> None:
    names = ["model"] if len(parts.model) == 1 else [f"model{n}" for n in range(len(parts.model))]
    for chunk, name in zip(parts.model, names, strict=True):
        chunk.load_state_dict(state[name], strict=True)
    if with_optimizer:
        if not parts.optimizer.is_stub_optimizer:
            AnyLayout(parts.optimizer).load_state_dict(state["optimizer"])
        parts.schedule.load_state_dict(state["opt_param_scheduler"])
    elif parts.optimizer is not None and (parts.args.fp16 or parts.args.bf16):
        parts.optimizer.reload_model_params()


def _set_rng(state: dict[str, Any]) -> None:
    random.setstate(state["random_rng_state"])
    np.random.set_state(state["np_rng_state"])
    torch.set_rng_state(state["torch_rng_state"])
    if state["cuda_rng_state"].shape != torch.cuda.get_rng_state().shape:
        return  # saved on a GPU and loaded on a CPU, or vice versa: the sequence cannot go on
    torch.cuda.set_rng_state(state["cuda_rng_state"])
    tracker = tensor_parallel.get_cuda_rng_tracker()
    in_graphs = tensor_parallel.is_graph_safe_cuda_rng_tracker(tracker)
    tracker.set_states(
        {
            name: tensor_parallel.convert_cuda_rng_state(generator, to_graphable=in_graphs)
            for name, generator in state["rng_tracker_states"].items()
        }
    )
