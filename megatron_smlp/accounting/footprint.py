"""Memory and traffic of one GPU in a parallel layout: plain arithmetic, no torch, no GPU.

Weights, gradients and Adam's state are exact; activations are an estimate, the tensors that
autograd saves with Megatron's local layers (no fused kernels). Traffic: accounting/traffic.py.

Letters as in accounting/ranks.py.
"""

from __future__ import annotations

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
    token_table,
)
from megatron_smlp.accounting.ranks import (
    FP32_BYTES,
    ParallelLayout,
    parameters_on_rank,
    quotient,
    stage_cost,
    stage_slots,
)
from megatron_smlp.accounting.traffic import (
    data_traffic,
    expert_traffic,
    pipeline_traffic,
    tensor_traffic,
)
from megatron_smlp.systems import LayerSlots

_ADAM_BYTES = 8
_BUCKET, _BUCKET_PER_RANK = 40_000_000, 1_000_000
"""Megatron's minimum gradient bucket for overlapped reduction, in all and per data rank."""


@dataclass(frozen=True)
class Footprint:
    """Memory and traffic of one GPU of the fullest pipeline stage, in bytes."""

    parameters: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    gradient_copy_bytes: int
    """fp32 copy of lower-precision gradients, from the last backward pass to the step's end."""
    activation_bytes: int
    save_gpu_bytes: int
    """Upper bound on memory in use at a save, without activations; of the stage with the most."""
    tensor_parallel_bytes: int
    """Sent in one step, as are the next three."""
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
    """Return the footprint of the GPU that uses the most memory.

    Raises:
        ValueError: the layers do not divide over the stages, or the experts over the ranks.
    """
    quotient("--num-layers", len(shape.slots), layout.pipeline, "PP")
    if shape.num_experts:
        quotient("--num-experts", shape.num_experts, layout.expert, "EP")
    stages = [_stage(shape, layout, stage) for stage in range(layout.pipeline)]
    fullest = max(stages, key=lambda stage: stage.memory_bytes)
    at_save = max(stage.save_gpu_bytes for stage in stages)
    return dataclasses.replace(fullest, save_gpu_bytes=at_save)


def activation_elements(shape: ModelShape, layout: ParallelLayout, slots: LayerSlots) -> float:
    """Return the elements per token saved for one layer's backward pass, on one rank, without
    recomputation."""
    cost = layer_cost(shape, slots)
    split = cost.kept + _of_split_norms(cost, layout)
    # A rank dispatches its 1 / tp of the tokens. An expert's etp ranks each gather the tokens of
    # all of them, etp / tp of all tokens, and hold 1 / etp of the hidden layer.
    split += cost.kept_at_experts * layout.expert_tensor + cost.kept_in_experts
    between = (2 if slots.channel == "none" else 4) * _slot_elements(shape, layout)
    return between + split / layout.tensor + cost.kept_everywhere


def _of_split_norms(cost: Cost, layout: ParallelLayout) -> float:
    """Return elements per token, over all ranks; fp32 ones count as several in run precision."""
    if layout.tensor == 1:
        return 0
    return cost.kept_by_split_norm * (1 + FP32_BYTES / layout.value_bytes)


def _slot_elements(shape: ModelShape, layout: ParallelLayout) -> float:
    """Return the elements per token between two slots, on one rank."""
    return shape.hidden_size / (layout.tensor if layout.sequence_parallel else 1)


def kept_elements(
    shape: ModelShape, layout: ParallelLayout, layers: Sequence[LayerSlots]
) -> tuple[float, float]:
    """Return the elements per token saved for a stage's backward pass, on one rank, and how many
    more exist at the peak of a backward pass that recomputes."""
    parts = list(_recomputed_parts(shape, layout, layers))
    kept = sum(part for part, _ in parts)
    # By the time a part is recomputed, what the later ones saved has been freed.
    held = itertools.accumulate(part for part, _ in parts)
    worst = max(so_far + again for so_far, (_, again) in zip(held, parts, strict=True))
    return kept, max(0, worst - kept)


def _recomputed_parts(
    shape: ModelShape, layout: ParallelLayout, layers: Sequence[LayerSlots]
) -> Iterator[tuple[float, float]]:
    """Yield, for each unit of recomputation, the elements kept, and those added to recompute it."""
    whole = [activation_elements(shape, layout, slots) for slots in layers]
    start = _slot_elements(shape, layout)
    if layout.recompute_granularity == "selective":
        for slots, kept in zip(layers, whole, strict=True):
            mixer = activation_elements(shape, layout, dataclasses.replace(slots, channel="none"))
            cost = layer_cost(shape, slots)
            again = (cost.recomputable + _of_split_norms(cost, layout)) / layout.tensor
            yield kept - again, again - (kept - mixer)  # the channel mixer's backward is over
    elif layout.recompute_granularity is None:
        yield sum(whole), 0
    elif layout.recompute_method == "block":  # the first layers, one at a time
        count = len(layout.repeated(layers))
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
    # 1F1B: a stage has as many micro-batches in flight as there are stages from it to the last.
    in_flight = min(layout.num_micro_batches, layout.pipeline - stage)
    loss = 0.0
    if stage == layout.pipeline - 1:
        # The logits, and their exponentials in fp32, both freed before layers are recomputed.
        loss = shape.padded_vocab_size / layout.tensor * (layout.value_bytes + FP32_BYTES)
    at_once = max(loss, again * layout.value_bytes)
    return round(tokens * (in_flight * kept * layout.value_bytes + at_once))


def _gathered_bytes(
    shape: ModelShape, layout: ParallelLayout, stage: int, dense: int, experts: int
) -> int:
    """Return the most bytes that a save gathers at once: two fp32 values per parameter of a bucket,
    the shards of all ranks and NCCL's block of them, plus this rank's own shard."""
    if not layout.gathers_on_gpus:
        return 0
    expert = shape.hidden_size * shape.moe_ffn_hidden_size * (2 if shape.gated_mlp else 1)
    buffers = (
        (dense, token_table(shape).sharded // layout.tensor, layout.data),
        (experts, expert // layout.expert_tensor, layout.expert_data),
    )
    most = 0
    for count, largest, ranks in buffers:
        bucket = count
        if layout.overlap_grad_reduce and stage == 0:
            # The parameter that reaches the minimum size closes the bucket.
            bucket = min(count, max(_BUCKET, _BUCKET_PER_RANK * layout.data) + largest)
        most = max(most, FP32_BYTES * (2 * bucket + bucket // ranks))
    return most


def _stage(shape: ModelShape, layout: ParallelLayout, stage: int) -> Footprint:
    dense, experts = parameters_on_rank(stage_cost(shape, layout, stage), layout)
    per_parameter = _ADAM_BYTES + (FP32_BYTES if layout.value_bytes < FP32_BYTES else 0)
    spread = layout.distributed_optimizer
    dense_share = dense // (layout.data if spread else 1)
    expert_share = experts // (layout.expert_data if spread else 1)
    share = dense_share + expert_share
    buffers = fingerprint_bytes(shape) if stage == 0 else 0
    weights = (dense + experts) * layout.value_bytes + buffers
    gradients = (dense + experts) * layout.gradient_bytes
    optimizer = share * per_parameter
    gathered = _gathered_bytes(shape, layout, stage, dense, experts)
    return Footprint(
        parameters=dense + experts,
        weight_bytes=weights,
        gradient_bytes=gradients,
        optimizer_bytes=optimizer,
        gradient_copy_bytes=0 if layout.gradient_bytes == FP32_BYTES else share * FP32_BYTES,
        activation_bytes=_activation_bytes(shape, layout, stage),
        save_gpu_bytes=weights + gradients + optimizer + gathered,
        tensor_parallel_bytes=tensor_traffic(shape, layout, stage),
        pipeline_parallel_bytes=pipeline_traffic(shape, layout, stage),
        expert_parallel_bytes=expert_traffic(shape, layout, stage),
        data_parallel_bytes=data_traffic(layout, dense, experts),
    )
