"""The parallel sizes of a run, and which part of a model each of its ranks holds.

Letters as in accounting/costs.py, and: tp, pp, ep, dp the tensor, pipeline, expert and data
parallel size, etp the tensor parallel size within an expert.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_smlp.accounting.costs import (
    Cost,
    ModelShape,
    input_cost,
    layer_cost,
    norm_cost,
    position_table,
    token_table,
    total,
)
from megatron_smlp.systems import LayerSlots

FP32_BYTES = 4
_BYTES = {"fp32": FP32_BYTES, "fp16": 2, "bf16": 2}


@dataclass(frozen=True, kw_only=True)
class ParallelLayout:
    """The parallel sizes of a run; names and defaults follow Megatron's flags."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    expert_tensor: int = 1
    data: int = 1
    micro_batch_size: int = 1
    num_micro_batches: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    gathers_on_gpus: bool = False
    """Whether a save gathers the optimizer's state in GPU memory."""
    overlap_grad_reduce: bool = False
    precision: str = "fp32"
    fp32_gradients: bool = True
    """Whether gradients are accumulated and reduced in fp32, not in the weights' precision."""
    recompute_granularity: str | None = None
    recompute_method: str | None = None
    recompute_num_layers: int | None = None

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> ParallelLayout:
        """Read Megatron's arguments, or any other object with the same attributes.

        Raises:
            ValueError: sizes do not fit together; the message names the flag and what would fit.
        """
        tensor, pipeline = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
        data = quotient("--world-size", args.world_size, tensor * pipeline, "TP * PP")
        expert_tensor = args.expert_tensor_parallel_size or tensor
        per_expert = args.expert_model_parallel_size * expert_tensor * pipeline
        quotient("--world-size", args.world_size, per_expert, "EP * expert TP * PP")
        samples = args.micro_batch_size * data
        batch = args.global_batch_size or samples
        return cls(
            tensor=tensor,
            pipeline=pipeline,
            expert=args.expert_model_parallel_size,
            expert_tensor=expert_tensor,
            data=data,
            micro_batch_size=args.micro_batch_size,
            num_micro_batches=quotient("--global-batch-size", batch, samples, "micro-batch * DP"),
            sequence_parallel=args.sequence_parallel,
            distributed_optimizer=args.use_distributed_optimizer or updates_by_layers(args),
            gathers_on_gpus=gathers(args)
            and not args.distrib_optim_fully_reshardable_mem_efficient,
            overlap_grad_reduce=args.overlap_grad_reduce,
            precision="bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
            fp32_gradients=args.accumulate_allreduce_grads_in_fp32,
            recompute_granularity=args.recompute_granularity,
            recompute_method=args.recompute_method,
            recompute_num_layers=args.recompute_num_layers,
        )

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data

    @property
    def expert_data(self) -> int:
        """Number of replicas of each expert."""
        return self.world_size // (self.pipeline * self.expert * self.expert_tensor)

    @property
    def value_bytes(self) -> int:
        return _BYTES[self.precision]

    @property
    def gradient_bytes(self) -> int:
        return FP32_BYTES if self.fp32_gradients else self.value_bytes

    def repeated(self, layers: Sequence[LayerSlots]) -> Sequence[LayerSlots]:
        """Return the layers of a stage whose forward pass is recomputed."""
        if self.recompute_granularity != "full":
            return ()
        return layers[: self.recompute_num_layers] if self.recompute_method == "block" else layers


def updates_by_layers(args: argparse.Namespace) -> bool:
    """Return whether each data parallel rank updates whole matrices of its own: Muon's distributed
    optimizer, for which Megatron's validation clears --use-distributed-optimizer."""
    return getattr(args, "use_layer_wise_distributed_optimizer", False)


def gathers(args: argparse.Namespace) -> bool:
    """Return whether each rank gathers the optimizer's state of all data parallel ranks."""
    return bool(args.use_distributed_optimizer and args.optimizer_checkpoint == "any_layout")


def quotient(flag: str, value: int, divisor: int, meaning: str) -> int:
    """Return value / divisor.

    Raises:
        ValueError: the result is not a positive integer.
    """
    if value < 1 or value % divisor:
        raise ValueError(f"{flag} {value} is not a multiple of {meaning} = {divisor}: choose one")
    return value // divisor


def stage_slots(shape: ModelShape, layout: ParallelLayout, stage: int) -> tuple[LayerSlots, ...]:
    """Return the layers of one pipeline stage."""
    per_stage = len(shape.slots) // layout.pipeline
    return shape.slots[stage * per_stage : (stage + 1) * per_stage]


def stage_cost(shape: ModelShape, layout: ParallelLayout, stage: int) -> Cost:
    """Return the cost of one stage's layers, plus the input on the first stage and the norm on the
    last, which also holds its own copy of a tied output embedding."""
    cost = total(layer_cost(shape, slots) for slots in stage_slots(shape, layout, stage))
    table = token_table(shape)
    is_first, is_last = stage == 0, stage == layout.pipeline - 1
    if is_first:
        cost += input_cost(shape) + position_table(shape)
    if is_last:
        cost += norm_cost(shape)
        if not (shape.tied_embeddings and is_first):
            cost += table
    return cost


def parameters_on_rank(cost: Cost, layout: ParallelLayout) -> tuple[int, int]:
    """Return how many parameters of a stage one rank holds: outside of experts, and in experts."""
    experts = cost.experts // (layout.expert * layout.expert_tensor)
    return cost.sharded // layout.tensor + cost.replicated, experts
