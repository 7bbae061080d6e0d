"""Memory and traffic of one GPU in a parallel layout: plain arithmetic, no torch, no GPU.

Memory: weights, gradients and Adam's state are exact; activations are the tensors that autograd
keeps with Megatron's local layers (no fused kernels), an estimate.
Communication: the bytes that one GPU sends in one optimizer step, with ring algorithms.

Letters as in accounting/costs.py, and: tp, pp, ep, dp tensor, pipeline, expert and data parallel
size, etp tensor parallel size within an expert.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_smlp.accounting.costs import (
    Cost,
    ModelShape,
    fingerprint_bytes,
    input_cost,
    layer_cost,
    norm_cost,
    position_table,
    token_table,
    total,
)
from megatron_smlp.systems import LayerSlots

_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
_FP32_BYTES = 4
_ADAM_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class ParallelLayout:
    """The parallel sizes of a run; names and defaults as Megatron's flags."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    expert_tensor: int = 1
    data: int = 1
    micro_batch_size: int = 1
    num_micro_batches: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    precision: str = "fp32"
    fp32_gradients: bool = True
    """Whether they are added up and reduced in fp32; else in the precision of the weights."""
    recompute_granularity: str | None = None
    recompute_method: str | None = None
    recompute_num_layers: int | None = None

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> ParallelLayout:
        """Read an object that has Megatron's names.

        Raises:
            ValueError: sizes that do not fit together, with the flag and what would fit.
        """
        tensor, pipeline = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
        data = _quotient("--world-size", args.world_size, tensor * pipeline, "TP * PP")
        expert_tensor = args.expert_tensor_parallel_size or tensor
        per_expert = args.expert_model_parallel_size * expert_tensor * pipeline
        _quotient("--world-size", args.world_size, per_expert, "EP * expert TP * PP")
        samples = args.micro_batch_size * data
        batch = args.global_batch_size or samples
        return cls(
            tensor=tensor,
            pipeline=pipeline,
            expert=args.expert_model_parallel_size,
            expert_tensor=expert_tensor,
            data=data,
            micro_batch_size=args.micro_batch_size,
            num_micro_batches=_quotient("--global-batch-size", batch, samples, "micro-batch * DP"),
            sequence_parallel=args.sequence_parallel,
            distributed_optimizer=args.use_distributed_optimizer,
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
        """Replicas of one expert."""
        return self.world_size // (self.pipeline * self.expert * self.expert_tensor)

    @property
    def value_bytes(self) -> int:
        return _BYTES[self.precision]

    @property
    def gradient_bytes(self) -> int:
        return _FP32_BYTES if self.fp32_gradients else self.value_bytes


def _quotient(flag: str, value: int, divisor: int, meaning: str) -> int:
    if value < 1 or value % divisor:
        raise ValueError(f"{flag} {value} is not a multiple of {meaning} = {divisor}: choose one")
    return value // divisor


@dataclass(frozen=True)
class Footprint:
    """One GPU of the fullest pipeline stage; bytes."""

    parameters: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    gradient_copy_bytes: int
    """In fp32, of gradients that are not: from the end of the last backward pass to the step's."""
    activation_bytes: int
    tensor_parallel_bytes: int
    """Sent in a step, as are the next three."""
    pipeline_parallel_bytes: int
    expert_parallel_bytes: int
    data_parallel_bytes: int

    @property
    def memory_bytes(self) -> int:
        state = self.weight_bytes + self.gradient_bytes + self.optimizer_bytes
        return state + max(self.activation_bytes, self.gradient_copy_bytes)

    @property
    def communication_bytes(self) -> int:
        return (
            self.tensor_parallel_bytes
            + self.pipeline_parallel_bytes
            + self.expert_parallel_bytes
            + self.data_parallel_bytes
        )


def footprint(shape: ModelShape, layout: ParallelLayout) -> Footprint:
    """Return the footprint of the GPU that holds most.

    Raises:
        ValueError: the layers do not divide over the stages, or the experts over the ranks.
    """
    _quotient("--num-layers", len(shape.slots), layout.pipeline, "PP")
    if shape.num_experts:
        _quotient("--num-experts", shape.num_experts, layout.expert, "EP")
    stages = [_stage(shape, layout, stage) for stage in range(layout.pipeline)]
    return max(stages, key=lambda stage: stage.memory_bytes)


def stage_slots(shape: ModelShape, layout: ParallelLayout, stage: int) -> tuple[LayerSlots, ...]:
    """Return the layers of one pipeline stage."""
    per_stage = len(shape.slots) // layout.pipeline
    return shape.slots[stage * per_stage : (stage + 1) * per_stage]


def stage_cost(shape: ModelShape, layout: ParallelLayout, stage: int) -> Cost:
    """Return the cost of one stage's layers, with the first one's input and the last one's norm;
    a tied output embedding is a copy on the last."""
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
    """Return how many parameters of a stage one rank holds: outside of experts, and in them."""
    experts = cost.experts // (layout.expert * layout.expert_tensor)
    return cost.sharded // layout.tensor + cost.replicated, experts


def activation_elements(shape: ModelShape, layout: ParallelLayout, slots: LayerSlots) -> float:
    """Numbers kept for one token's backward pass through one layer, on one rank, without
    recomputation."""
    cost = layer_cost(shape, slots)
    inside = cost.kept / layout.tensor + cost.kept_everywhere + _of_split_norms(cost, layout)
    # A rank dispatches its 1 / tp of the tokens, and an expert's etp ranks get what each of them
    # would: etp / tp of all tokens, of which each rank has 1 / etp of the hidden layer.
    at_experts = cost.kept_at_experts * layout.expert_tensor + cost.kept_in_experts
    inside += at_experts / layout.tensor
    return (2 if slots.channel == "none" else 4) * _slot_elements(shape, layout) + inside


def _of_split_norms(cost: Cost, layout: ParallelLayout) -> float:
    """Numbers of one token, in units of the run's precision."""
    is_split = layout.tensor > 1
    return is_split * cost.kept_by_split_norm * (1 + 4 / layout.value_bytes) / layout.tensor


def _slot_elements(shape: ModelShape, layout: ParallelLayout) -> float:
    """Numbers of one token between two slots, on one rank."""
    return shape.hidden_size / (layout.tensor if layout.sequence_parallel else 1)


def kept_elements(
    shape: ModelShape, layout: ParallelLayout, layers: Sequence[LayerSlots]
) -> tuple[float, float]:
    """Numbers kept for one token's backward pass through a stage's layers, on one rank; and how
    many more there are at the worst moment of a backward pass that recomputes."""
    parts = list(_recomputed_parts(shape, layout, layers))
    kept = sum(part for part, _ in parts)
    # Where a part is recomputed, what is kept of the later ones has gone.
    held = itertools.accumulate(part for part, _ in parts)
    worst = max(so_far + again for so_far, (_, again) in zip(held, parts, strict=True))
    return kept, max(0, worst - kept)


def _recomputed_parts(
    shape: ModelShape, layout: ParallelLayout, layers: Sequence[LayerSlots]
) -> Iterator[tuple[float, float]]:
    """Yield, for each part that is recomputed at once, what is kept of it and what comes again."""
    whole = [activation_elements(shape, layout, slots) for slots in layers]
    start = _slot_elements(shape, layout)
    if layout.recompute_granularity == "selective":
        for slots, kept in zip(layers, whole, strict=True):
            mixer = activation_elements(shape, layout, dataclasses.replace(slots, channel="none"))
            cost = layer_cost(shape, slots)
            again = cost.recomputable / layout.tensor + _of_split_norms(cost, layout)
            yield kept - again, again - (kept - mixer)  # the channel mixer's pass is over
    elif layout.recompute_granularity is None:
        yield sum(whole), 0
    elif layout.recompute_method == "block":  # the first layers, each by itself
        count = layout.recompute_num_layers or 1
        yield from ((start, kept - start) for kept in whole[:count])
        yield sum(whole[count:]), 0
    else:
        for chunk in itertools.batched(whole, layout.recompute_num_layers or 1):
            yield start, sum(chunk) - start


def _activation_bytes(shape: ModelShape, layout: ParallelLayout, stage: int) -> int:
    tokens = layout.micro_batch_size * shape.seq_length
    kept, again = kept_elements(shape, layout, stage_slots(shape, layout, stage))
    if stage == 0:
        kept += input_cost(shape).kept_everywhere
    # One forward, one backward at a time: earlier stages are ahead by the stages behind them.
    in_flight = min(layout.num_micro_batches, layout.pipeline - stage)
    loss = 0.0
    if stage == layout.pipeline - 1:
        # The logits, and their exponentials in fp32; they have gone when layers are recomputed.
        loss = shape.padded_vocab_size / layout.tensor * (layout.value_bytes + 4)
    at_once = max(loss, again * layout.value_bytes)
    return round(tokens * (in_flight * kept * layout.value_bytes + at_once))


def _stage(shape: ModelShape, layout: ParallelLayout, stage: int) -> Footprint:
    dense, experts = parameters_on_rank(stage_cost(shape, layout, stage), layout)
    per_parameter = _ADAM_BYTES + (_FP32_BYTES if layout.value_bytes < 4 else 0)
    spread = layout.distributed_optimizer
    dense_share = dense // (layout.data if spread else 1)
    expert_share = experts // (layout.expert_data if spread else 1)
    share = dense_share + expert_share
    buffers = fingerprint_bytes(shape) if stage == 0 else 0
    return Footprint(
        parameters=dense + experts,
        weight_bytes=(dense + experts) * layout.value_bytes + buffers,
        gradient_bytes=(dense + experts) * layout.gradient_bytes,
        optimizer_bytes=share * per_parameter,
        gradient_copy_bytes=0 if layout.gradient_bytes == _FP32_BYTES else share * _FP32_BYTES,
        activation_bytes=_activation_bytes(shape, layout, stage),
        tensor_parallel_bytes=_tensor_traffic(shape, layout, stage),
        pipeline_parallel_bytes=_pipeline_traffic(shape, layout, stage),
        expert_parallel_bytes=_expert_traffic(shape, layout, stage),
        data_parallel_bytes=_data_traffic(layout, dense, experts),
    )


def _ring(size: int, ranks: int) -> float:
    """Return what a rank sends in an all-reduce, or a reduce-scatter and an all-gather."""
    return 2 * (ranks - 1) / ranks * size


def _hidden_bytes(shape: ModelShape, layout: ParallelLayout) -> int:
    tokens = layout.micro_batch_size * shape.seq_length
    return tokens * shape.hidden_size * layout.value_bytes


def _tensor_traffic(shape: ModelShape, layout: ParallelLayout, stage: int) -> int:
    """Each pair of projections reduces its output forward, its input's gradient backward."""
    layers = stage_slots(shape, layout, stage)
    num_pairs = len(layers) + sum(slots.channel == "mlp" for slots in layers)
    per_pair = 2 * _ring(_hidden_bytes(shape, layout), layout.tensor)
    return round(num_pairs * per_pair * layout.num_micro_batches)


def _pipeline_traffic(shape: ModelShape, layout: ParallelLayout, stage: int) -> int:
    """Activations to the next stage, gradients to the one before."""
    neighbours = (stage > 0) + (stage < layout.pipeline - 1)
    size = _hidden_bytes(shape, layout)
    if layout.sequence_parallel:
        size //= layout.tensor
    return neighbours * size * layout.num_micro_batches


def _expert_traffic(shape: ModelShape, layout: ParallelLayout, stage: int) -> int:
    """Tokens to their experts and back, forward and backward; 1/ep of them are there already."""
    num_moe = sum(slots.channel == "token_moe" for slots in stage_slots(shape, layout, stage))
    size = _hidden_bytes(shape, layout) * shape.moe_router_topk
    if layout.sequence_parallel:
        size //= layout.tensor
    away = (layout.expert - 1) / layout.expert
    return round(4 * num_moe * size * away * layout.num_micro_batches)


def _data_traffic(layout: ParallelLayout, dense: int, experts: int) -> int:
    """Gradients; the distributed optimizer sends weights back instead."""
    back = layout.value_bytes if layout.distributed_optimizer else layout.gradient_bytes
    per_parameter = (layout.gradient_bytes + back) / 2
    traffic = _ring(dense, layout.data) + _ring(experts, layout.expert_data)
    return round(traffic * per_parameter)
