"""The cost of each token mixer with its norm; letters and conventions as in accounting/costs.py."""

from __future__ import annotations

from megatron_smlp.accounting.costs import Cost, ModelShape, column, norm_cost, pairs, row
from megatron_smlp.accounting.plugin_costs import feature_router_cost
from megatron_smlp.systems import FEATURE_ROUTERS, LayerSlots


def attention_cost(shape: ModelShape, slots: LayerSlots) -> Cost:
    """Count the q, k, v and output projections, the causal scores and their product with v."""
    width, qkv = shape.attention_width, shape.attention_width + 2 * shape.key_value_width
    changes = shape.rotary_positions or shape.normed_head_width > 0
    changed = (width + shape.key_value_width) * changes
    kept = Cost(kept=qkv + changed + width)  # q, k, v, normed or rotated q and k, the mixed values
    norms = Cost(replicated=2 * shape.norm_parameters * shape.normed_head_width)
    projections = norm_cost(shape) + norms + column(shape, qkv) + row(shape, width)
    window = shape.attention_window
    passed = 0 if window is None else max(0, shape.seq_length - 1 - window)
    unread = 2 * width * passed * (passed + 1)  # FLOPs of the pairs before the window
    return projections + pairs(shape, 2 * width) + Cost(flops=-unread, above_flops=unread) + kept


def gating_cost(shape: ModelShape, slots: LayerSlots, *, everywhere: bool = False) -> Cost:
    """Count spatial gating: U, the heads' norm, M and b, V. FLOPs depend neither on the heads nor
    on whether M is Toeplitz, as it is multiplied in blocks (ops/toeplitz_mix.py).

    Args:
        everywhere: whether every rank holds all matrices, as it always does for a single head,
            which is split over the whole group.
    """
    gate_width, heads = shape.ffn_hidden_size // 2, slots.heads
    # u after the GELU, the normed gate and the mixed one; the norm of several heads also keeps its
    # result before the weight. Kept as well: u before the GELU, and the product.
    in_gate = shape.ffn_hidden_size + (3 if heads > 1 else 2) * gate_width
    return (
        norm_cost(shape)
        + column(shape, shape.ffn_hidden_size)
        + Cost(sharded=2 * gate_width)
        + _spatial(shape, heads, everywhere=everywhere or heads == 1)
        + pairs(shape, gate_width)
        + row(shape, gate_width)
        + Cost(kept=shape.ffn_hidden_size + in_gate + gate_width, recomputable=in_gate)
        + Cost(kept_by_split_norm=gate_width if heads == 1 else 0)
    )


def _spatial(shape: ModelShape, count: int, *, everywhere: bool) -> Cost:
    """Return the cost of `count` spatial matrices and their biases, without the products."""
    parameters = count * shape.matrix_parameters
    zeros = 0 if shape.options.toeplitz else count * (shape.square - shape.triangle)
    if everywhere:
        return Cost(replicated=parameters, summed=parameters, zero_parameters=zeros)
    return Cost(sharded=parameters, zero_parameters=zeros)


def gating_and_attention_cost(shape: ModelShape, slots: LayerSlots) -> Cost:
    """Count aMLP's slot: the attention head shares the gate's norm, and has none of its own."""
    width, gate_width = shape.options.tiny_attention_width, shape.ffn_hidden_size // 2
    bias = int(shape.linear_bias)
    head = Cost(
        replicated=3 * width * (shape.hidden_size + bias),
        sharded=gate_width * (width + bias),
        flops=2 * shape.seq_length * width * (3 * shape.hidden_size + gate_width),
        kept_everywhere=(4 + 2 * shape.rotary_positions) * width,
        recomputable=-gate_width,  # its output is kept, as an input of the gate
    )
    return gating_cost(shape, slots) + head + pairs(shape, 2 * width)


def feature_moe_cost(shape: ModelShape, slots: LayerSlots) -> Cost:
    """Count spatial gating. With partial prediction, add the router: any chunk may choose any
    expert, and the first P rows are a causal P x P product of their own."""
    prefix, gate_width = shape.prefix_length, shape.ffn_hidden_size // 2
    if not prefix:
        return gating_cost(shape, slots)
    unread = Cost(above_flops=-2 * prefix * (shape.seq_length - prefix) * gate_width)
    # The mixed values before they are scaled.
    kept = Cost(kept=gate_width, recomputable=gate_width)
    plugin = FEATURE_ROUTERS[shape.options.feature_router].plugin
    if plugin:
        router = feature_router_cost(shape, plugin, num_experts=slots.heads)
    else:
        router = prefix_router_cost(shape, slots.heads)
    return gating_cost(shape, slots, everywhere=True) + router + unread + kept


def prefix_router_cost(shape: ModelShape, num_experts: int) -> Cost:
    """Count partial prediction's router: one weight per prefix position and expert."""
    parameters = shape.prefix_length * num_experts
    flops = 2 * shape.num_feature_chunks * parameters
    return Cost(replicated=parameters, summed=parameters, flops=flops)


def masked_mixer_cost(shape: ModelShape, slots: LayerSlots) -> Cost:
    """Count one or two matrices per head over D; those of a single head are on every rank."""
    heads, layers = slots.heads, 1 + shape.options.mixer_expansion
    return (
        norm_cost(shape)
        + _spatial(shape, layers * heads, everywhere=heads == 1)
        + pairs(shape, layers * shape.hidden_size)
        # The columns of several heads, and what the GELU reads and writes.
        + Cost(kept=((heads > 1) + 2 * (layers - 1)) * shape.hidden_size)
    )
