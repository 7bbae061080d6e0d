"""The bytes that one GPU sends in one optimizer step, with ring algorithms: plain arithmetic.

For S bytes over n ranks, each rank sends (n - 1) / n S in an all-gather, a reduce-scatter or an
all-to-all, and twice that in an all-reduce. Per-token data other than hidden states is left out:
router scores, and the sums for norms and losses.

Letters as in accounting/ranks.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_smlp.accounting.costs import ModelShape, layer_cost, token_table
from megatron_smlp.accounting.plugin_costs import values_of
from megatron_smlp.accounting.ranks import FP32_BYTES, ParallelLayout, stage_slots
from megatron_smlp.systems import CHANNELS, MIXERS, LayerSlots


def tensor_traffic(shape: ModelShape, layout: ParallelLayout, stage: int) -> int:
    """Return the bytes sent for sharded projections, embeddings and logits, and for the gradients
    of replicated matrices that each rank applies to features of its own."""
    layers = stage_slots(shape, layout, stage)
    sent = [_of_layer(shape, layout, slots) for slots in layers]
    again = [_of_layer(shape, layout, slots) for slots in layout.repeated(layers)]
    numbers = sum(forward + backward for forward, backward in sent)
    numbers += sum(forward for forward, _ in again) + _of_ends(shape, layout, stage)
    tokens = layout.micro_batch_size * shape.seq_length
    summed = sum(layer_cost(shape, slots).summed for slots in layers)
    size = (tokens * numbers + 2 * summed) * layout.value_bytes
    return round(_sent(size, layout.tensor) * layout.num_micro_batches)


def pipeline_traffic(shape: ModelShape, layout: ParallelLayout, stage: int) -> int:
    """Return the bytes of activations to the next stage and gradients to the previous one, and of
    summing a tied embedding's gradients over the first and the last stage."""
    neighbours = (stage > 0) + (stage < layout.pipeline - 1)
    size = _hidden_bytes(shape, layout)
    if layout.sequence_parallel:
        size //= layout.tensor
    is_end = neighbours == 1 and shape.tied_embeddings
    tied = is_end * token_table(shape).sharded // layout.tensor * layout.gradient_bytes
    return neighbours * size * layout.num_micro_batches + tied


def expert_traffic(shape: ModelShape, layout: ParallelLayout, stage: int) -> int:
    """Return the bytes of dispatching tokens to their experts and back, and of their gradients. The
    ranks of a sharded expert also all-gather their tokens and reduce-scatter outputs in fp32."""
    layers = stage_slots(shape, layout, stage)
    passes = [2 * _count_moes(layers), _count_moes(layout.repeated(layers))]
    size = _hidden_bytes(shape, layout) * shape.moe_router_topk / layout.tensor
    dispatch = 2 * _sent(size, layout.expert)
    gathered = size * layout.expert_tensor
    in_expert = _sent(gathered * (1 + FP32_BYTES / layout.value_bytes), layout.expert_tensor)
    return round(sum(passes) * (dispatch + in_expert) * layout.num_micro_batches)


def data_traffic(layout: ParallelLayout, dense: int, experts: int) -> int:
    """Return the bytes to reduce gradients and, with the distributed optimizer, gather weights.

    Args:
        dense: parameters on a rank outside of experts.
        experts: parameters on a rank in experts.
    """
    back = layout.value_bytes if layout.distributed_optimizer else layout.gradient_bytes
    parameters = _sent(dense, layout.data) + _sent(experts, layout.expert_data)
    return round(parameters * (layout.gradient_bytes + back))


def _sent(size: float, ranks: int) -> float:
    return (ranks - 1) / ranks * size


def _hidden_bytes(shape: ModelShape, layout: ParallelLayout) -> int:
    tokens = layout.micro_batch_size * shape.seq_length
    return tokens * shape.hidden_size * layout.value_bytes


def _count_moes(layers: Sequence[LayerSlots]) -> int:
    return sum(slots.channel == "token_moe" for slots in layers)


def _of_layer(shape: ModelShape, layout: ParallelLayout, slots: LayerSlots) -> tuple[float, float]:
    """Return how many elements per token the tensor parallel group gathers or scatters: in the
    forward pass, and in the backward pass."""
    hidden, pairs = shape.hidden_size, layer_cost(shape, slots).pairs
    # An all-reduce is a gather and a scatter, and so is sequence parallelism's pair of the two,
    # which also gathers the input again for the gradient of the weights.
    forward: float = 2 * pairs * hidden
    backward: float = (2 + layout.sequence_parallel) * pairs * hidden
    if slots.mixer == "masked_mixer":  # exchanges tokens for features, and back
        exchanged = 2 * hidden / layout.tensor if layout.sequence_parallel else hidden
        forward += exchanged
        backward += exchanged
    if slots.mixer == "gating_and_attention":  # every rank has its head, for all tokens
        backward += 2 * 3 * shape.options.tiny_attention_width
        forward += hidden * layout.sequence_parallel
    for kind in (MIXERS[slots.mixer].plugin, CHANNELS.get(slots.channel)):
        if kind is not None:
            more = (len(kind.inner) - 1) * hidden  # each projection gathers the input separately
            forward += more * layout.sequence_parallel
            backward += 2 * more
            if kind.whole:
                sizes = {"hidden_size": hidden, "ffn_hidden_size": shape.ffn_hidden_size}
                features = kind.features(**sizes, values=values_of(shape, kind))
                forward += sum(kind.inner.values()) * features
                backward += features  # the gradient of what every rank has mixed
    return forward, backward


def _of_ends(shape: ModelShape, layout: ParallelLayout, stage: int) -> int:
    """Return the same, both passes summed, for the first stage's embedding and the last one's
    logits."""
    hidden, is_sequence = shape.hidden_size, layout.sequence_parallel
    numbers = 0
    if stage == 0 and shape.options.input_projection == "embedding":
        # Positions are added to the full sums, which are scattered afterwards.
        numbers += 2 * hidden + hidden * (is_sequence and shape.num_positions > 0)
    if stage == layout.pipeline - 1:
        numbers += (2 + is_sequence) * hidden
    return numbers
