"""Builds the parts of a training, all of them Megatron's: model, optimizer, schedule."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import Any

from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import get_megatron_optimizer, get_mup_config_overrides
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config
from megatron.training import get_timers
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.initialize import initialize_megatron
from megatron.training.training import (
    get_megatron_optimizer_config,
    get_optimizer_param_scheduler,
    set_startup_timestamps,
    update_train_iters,
)
from megatron.training.utils import start_memory_history_recording

from megatron_smlp.collectives import gathered
from megatron_smlp.flags.check import megatrons_refusals
from megatron_smlp.megatron_patches import torch_adam
from megatron_smlp.model import model_config
from megatron_smlp.platform import cpu
from megatron_smlp.plugins import register
from megatron_smlp.training.data import open_many_files
from megatron_smlp.training.same_everywhere import run_store

type PerChunk[T] = T | list[T]
"""One, or with interleaved pipeline stages one per model chunk, as Megatron's schedules expect."""


@dataclass
class Parts:
    """The objects that the steps of a run read and write."""

    args: argparse.Namespace
    model: list[Any]
    """This rank's model chunks, one per virtual pipeline stage, wrapped in Megatron's DDP."""
    optimizer: Any
    """None with --skip-train, as is the schedule."""
    schedule: Any
    """Schedule of learning rate and weight decay."""
    config: Any
    """The model's config, which holds the functions that Megatron's schedules call."""
    groups: ProcessGroupCollection
    began: float
    """`time.time()` when the first rank's program began, for --exit-duration-in-mins."""


def configuration(args: argparse.Namespace) -> Any:
    """Return Megatron's configuration of the run; constructing it rejects some flags."""
    with megatrons_refusals():
        return pretrain_cfg_container_from_args(args, model_config(args))


def build(args: argparse.Namespace, *, began: float) -> Parts:
    """Start Megatron and build everything but the data. Collective."""
    settings = configuration(args)
    open_many_files()
    initialize_megatron(allow_no_cuda=cpu.needed(), store=run_store(args))
    began = min(gathered(began))
    set_startup_timestamps(program_start=began)  # Megatron's `evaluate` counts from here too
    groups = ProcessGroupCollection.use_mpu_process_groups()
    start_memory_history_recording(settings.profiling)
    model = _model(settings, groups, trains=not args.skip_train)
    optimizer, schedule = (None, None) if args.skip_train else _optimizer(args, model)
    if args.skip_train and args.train_samples:
        update_train_iters(args)
    config = get_model_config(model[0])
    parts = Parts(args, model, optimizer, schedule, config, groups, began)
    _connect(parts)
    return parts


def _model(settings: Any, groups: ProcessGroupCollection, *, trains: bool) -> list[Any]:
    builder = settings.model.get_builder_cls()(settings.model)
    chunks: list[Any] = builder.build_distributed_models(
        pg_collection=groups,
        ddp_config=settings.ddp,
        overlap_param_gather_with_optimizer_step=(
            settings.optimizer.overlap_param_gather_with_optimizer_step
        ),
        use_megatron_fsdp=settings.dist.use_megatron_fsdp,
        use_torch_fsdp2=settings.dist.use_torch_fsdp2,
        wrap_with_ddp=trains,
        data_parallel_random_init=settings.rng.data_parallel_random_init,
    )
    return chunks


def _optimizer(args: argparse.Namespace, model: list[Any]) -> tuple[Any, Any]:
    config, overrides = get_megatron_optimizer_config(args)
    config.timers = get_timers()
    if args.optimizer == "muon":
        leave_to_adam(model)
    if args.use_mup:
        times = get_model_config(model[0]).mup_width_mult
        overrides = {**(overrides or {}), **get_mup_config_overrides(config, times)}
    optimizer = get_megatron_optimizer(
        config,
        model,
        config_overrides=overrides,
        use_gloo_process_groups=args.use_gloo_process_groups,
        dump_param_to_param_group_map=args.dump_param_to_param_group_map,
    )
    torch_adam.fuse_steps(optimizer)
    return optimizer, _with_plugins(get_optimizer_param_scheduler(optimizer))


def _with_plugins(schedule: Any) -> Any:
    """Multiply the learning rate by the factors that plugins registered."""
    plain = schedule.get_lr

    def rate(group: dict[str, Any]) -> float:
        done = min(1.0, schedule.num_steps / schedule.lr_decay_steps)
        return math.prod((factor(done) for factor in register.schedules), start=plain(group))

    if register.schedules:
        schedule.get_lr = rate
        schedule.step(increment=0)
    return schedule


def leave_to_adam(model: list[Any]) -> None:
    """Restrict Muon to the matrices of Megatron's linear layers (decision 87): Megatron gives Adam
    the parameters marked here, with --decoupled-lr if that is given."""
    for module in (module for chunk in model for module in chunk.modules()):
        is_linear = type(module).__name__.endswith(("ParallelLinear", "GroupedLinear"))
        for parameter in module.parameters(recurse=False):
            if not (is_linear and parameter.dim() == 2):  # also biases, fused norms' weights
                parameter.is_embedding_or_output_parameter = True


def _connect(parts: Parts) -> None:
    """Set the functions that Megatron's schedules call around a forward and backward pass.

    With overlapped communication, DDP reduces gradients during the backward pass of the last
    micro-batch and all-gathers parameters during the next forward pass.
    """
    args, model, config = parts.args, parts.model, parts.config
    config.timers = get_timers()
    config.grad_scale_func = parts.optimizer.scale_loss if parts.optimizer else None
    overlaps = isinstance(model[0], DistributedDataParallel) and args.overlap_grad_reduce
    if overlaps:
        config.no_sync_func = per_chunk([chunk.no_sync for chunk in model])
        if args.align_grad_reduce:
            config.grad_sync_func = per_chunk([chunk.start_grad_sync for chunk in model])
    if overlaps and args.overlap_param_gather and args.align_param_gather:
        config.param_sync_func = per_chunk([chunk.start_param_sync for chunk in model])
    config.finalize_model_grads_func = finalize_model_grads


def per_chunk[T](chunks: list[T]) -> PerChunk[T]:
    return chunks[0] if len(chunks) == 1 else chunks
