"""Parameters and FLOPs of every architecture: plain arithmetic, no torch, no GPU.

FLOPs are 2 per multiply-add, forward, and training is 3 x forward. Two conventions, which differ
only where a product is causal:

    needed   the lower triangle with its diagonal: T (T + 1) / 2 of the T x T pairs of positions
    paper    the full square: 24 layers of width 1024 at T = 1024, V = 50,257 are 0.827 TFLOPs

Letters: T sequence length, D hidden, Z ffn_hidden_size, F = Z / 2 gate width, V padded vocabulary,
E experts, X width of a token expert, S width of a shared one, h heads, k experts a token visits,
P prefix length of partial prediction, C chunks of features.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_smlp.options import PLUGIN_OPTIONS, ModelOptions, options_of
from megatron_smlp.systems import (
    BY_PREFIX,
    CHANNELS,
    MIXERS,
    TOKEN_ROUTERS,
    LayerSlots,
    experts_of_a_token,
    layer_slots,
    load,
)

TOKENS_PER_REPORT = 1024
PLUGIN_COST = "megatron_smlp.accounting.plugin_costs:plugin_cost"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Parameters and FLOPs of one part of the model, and what of it lies where."""

    sharded: int = 0
    """Parameters that are split over the tensor parallel group."""
    replicated: int = 0
    """Parameters that every rank of it holds."""
    experts: int = 0
    """Parameters of token experts: split over the expert parallel group, and within an expert."""
    idle: int = 0
    """Parameters of the experts that one token does not visit."""
    zero_parameters: int = 0
    """Those above the diagonals of spatial matrices, which stay zero and are never read."""
    summed: int = 0
    """Replicated parameters whose gradients each backward pass sums over that group."""
    pairs: int = 0
    """Pairs of split projections: that group sums their outputs, and the gradients of inputs."""
    flops: int = 0
    """Forward FLOPs of one sequence, only the needed ones."""
    above_flops: int = 0
    """Those above the diagonals of causal products, which full squares have as well."""
    kept: int = 0
    """Numbers of a token, beside the slot's input and its norm, that the backward pass needs, split
    over the tensor parallel group."""
    recomputable: int = 0
    """Those of them that --recompute-granularity selective gives up for another forward pass."""
    kept_by_split_norm: int = 0
    """The same of a norm whose one head is split over several ranks: once, and once in fp32."""
    kept_everywhere: int = 0
    """The same of numbers that every rank of it keeps."""
    kept_at_experts: int = 0
    """The same of a token as an expert takes and gives it, whole on each rank of that expert."""
    kept_in_experts: int = 0
    """The same of numbers that are split within an expert."""

    def __add__(self, other: Cost) -> Cost:
        names = (field.name for field in dataclasses.fields(self))
        return Cost(**{name: getattr(self, name) + getattr(other, name) for name in names})

    @property
    def square_flops(self) -> int:
        """`flops` with full squares instead of triangles: the paper's convention."""
        return self.flops + self.above_flops

    @property
    def parameters(self) -> int:
        return self.sharded + self.replicated + self.experts

    @property
    def active_parameters(self) -> int:
        """Parameters that one token's forward pass uses, with the zeros of spatial matrices."""
        return self.parameters - self.idle


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes that decide what a model costs; names as in Megatron's arguments."""

    slots: tuple[LayerSlots, ...]
    hidden_size: int
    ffn_hidden_size: int
    seq_length: int
    padded_vocab_size: int
    attention_width: int
    """Width of the queries over all heads: heads * kv_channels."""
    key_value_width: int
    """Width of the keys, and of the values: query groups * kv_channels."""
    num_experts: int = 0
    token_router: str = ModelOptions.token_router
    """The rule that routes tokens; none: Megatron's own, under a bare `--spec`."""
    moe_ffn_hidden_size: int = 0
    moe_router_topk: int = 1
    options: ModelOptions = dataclasses.field(default_factory=ModelOptions)
    """Our flags of the model, for what a mixer alone reads."""
    plugin_values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Of the options of plugins."""
    shared_expert_size: int = 0
    """Width of the FFN that every token visits beside its experts; 0: there is none."""
    prefix_length: int = 0
    """P, tokens from which partial prediction routes; 0: no such routing."""
    num_feature_chunks: int = 0
    """C, chunks of features that partial prediction routes."""
    num_positions: int = 0
    """Rows of the table of learned positions; 0: there is none."""
    rotary_positions: bool = False
    normed_head_width: int = 0
    """Width of a norm of the queries and one of the keys; 0: there are none."""
    tied_embeddings: bool = True
    linear_bias: bool = True
    norm_parameters: int = 2
    """Parameter vectors of a norm: 2 for LayerNorm, 1 for RMSNorm."""
    gated_mlp: bool = False
    kept_by_activation: int = 1
    """Of each number of an FFN's hidden layer, those that are kept up to its activation."""

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> ModelShape:
        """Read Megatron's namespace after validation, or any other object with the same names."""
        width = args.kv_channels * args.num_attention_heads
        groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
        options = options_of(args)
        # A namespace of Megatron's own script has experts and no rule of ours.
        num_experts = None if getattr(args, "token_router", "") == "none" else args.num_experts
        is_partial = options.feature_router in BY_PREFIX
        positions = args.position_embedding_type
        return cls(
            slots=tuple(layer_slots(options, args, num_experts=num_experts)),
            hidden_size=args.hidden_size,
            ffn_hidden_size=args.ffn_hidden_size,
            seq_length=args.seq_length,
            padded_vocab_size=args.padded_vocab_size,
            attention_width=width,
            key_value_width=groups * args.kv_channels,
            num_experts=num_experts or 0,
            token_router=options.token_router,
            moe_ffn_hidden_size=args.moe_ffn_hidden_size or args.ffn_hidden_size,
            moe_router_topk=experts_of_a_token(options.token_router, args.moe_router_topk),
            options=options,
            plugin_values={name: getattr(args, name) for name in PLUGIN_OPTIONS},
            shared_expert_size=args.moe_shared_expert_intermediate_size or 0 if num_experts else 0,
            prefix_length=options.prefix_length(args.seq_length),
            num_feature_chunks=options.num_chunks if is_partial else 0,
            num_positions=args.max_position_embeddings if positions == "learned_absolute" else 0,
            rotary_positions=positions == "rope",
            normed_head_width=args.kv_channels if args.qk_layernorm else 0,
            tied_embeddings=not args.untie_embeddings_and_output_weights,
            linear_bias=args.add_bias_linear,
            norm_parameters=2 if args.normalization == "LayerNorm" else 1,
            gated_mlp=args.swiglu or args.quick_geglu,
            kept_by_activation=_kept_by_activation(args),
        )

    @property
    def triangle(self) -> int:
        """Pairs of positions (t, s) with s <= t."""
        return self.seq_length * (self.seq_length + 1) // 2

    @property
    def router_has_weights(self) -> bool:
        """Return whether the token router scores tokens by a matrix."""
        rule = TOKEN_ROUTERS.get(self.token_router)
        return rule is None or rule.has_weights

    @property
    def square(self) -> int:
        return self.seq_length**2

    @property
    def matrix_parameters(self) -> int:
        """M and b of one spatial head or expert."""
        return self.seq_length + (1 if self.options.toeplitz else self.square)


def _kept_by_activation(args: argparse.Namespace) -> int:
    """Return how many numbers are kept up to the activation, of each number behind it: 1 without a
    gate; 2, the halves, by a fused SwiGLU; 4 by another, with both factors of the product; 5 by a
    gated quick GELU, with its sigmoid."""
    if args.quick_geglu:
        return 5
    if args.swiglu:
        return 2 if args.bias_swiglu_fusion else 4
    return 1


def model_cost(shape: ModelShape) -> Cost:
    """Return the cost of the whole model: embeddings, layers, final norm, logits."""
    return total([embedding_cost(shape), *(layer_cost(shape, s) for s in shape.slots)])


def total(costs: Iterable[Cost]) -> Cost:
    return sum(costs, start=Cost())


def forward_tflops_per_1024_tokens(cost: Cost, shape: ModelShape) -> tuple[float, float]:
    """(paper convention, needed only), in TFLOPs."""
    scale = TOKENS_PER_REPORT / shape.seq_length / 1e12
    return cost.square_flops * scale, cost.flops * scale


def training_flops_per_token(cost: Cost, shape: ModelShape) -> tuple[float, float]:
    """(paper convention, needed only) of forward and backward for one token.

    A token visits as many experts as its rule may send it to: what training drops, or GShard does
    not draw, is of `choice_flops` less.
    """
    return 3 * cost.square_flops / shape.seq_length, 3 * cost.flops / shape.seq_length


def choice_flops(shape: ModelShape) -> int:
    """Forward FLOPs of one token in one of its experts."""
    return 2 * _expert_parameters(shape)


def choices_per_token(shape: ModelShape) -> int:
    """Experts that a token may be sent to, over all layers."""
    layers = sum(slots.channel == "token_moe" for slots in shape.slots)
    return layers * shape.moe_router_topk


def embedding_cost(shape: ModelShape) -> Cost:
    """Return the costs of the input and its positions, the final norm, and the logits."""
    table = token_table(shape)
    logits = Cost(flops=2 * shape.seq_length * table.parameters)
    logits += Cost() if shape.tied_embeddings else table
    return input_cost(shape) + position_table(shape) + norm_cost(shape) + logits


def input_cost(shape: ModelShape) -> Cost:
    """Return the cost of the input: an embedding, or the projection of hashes with its norm."""
    options = shape.options
    if options.input_projection == "embedding":
        return token_table(shape)
    features = (options.window + 1) * options.filter_size
    return Cost(
        replicated=features * (shape.hidden_size + 2),
        flops=2 * shape.seq_length * features * shape.hidden_size,
        kept_everywhere=2 * features,  # the counters before and after the norm
    )


def fingerprint_bytes(shape: ModelShape) -> int:
    """Return the bytes of the minhash table, which is not trained: int32 values."""
    options = shape.options
    is_hashed = options.input_projection == "minhash"
    return 4 * shape.padded_vocab_size * options.hash_count * is_hashed


def token_table(shape: ModelShape) -> Cost:
    """Return the cost of the token embeddings, or of an output layer that is not tied to them."""
    return Cost(sharded=shape.padded_vocab_size * shape.hidden_size)


def position_table(shape: ModelShape) -> Cost:
    """Return the cost of the position embeddings, if they are learned."""
    return Cost(replicated=shape.num_positions * shape.hidden_size)


def norm_cost(shape: ModelShape) -> Cost:
    """Return the cost of a norm over the hidden dimension."""
    return Cost(replicated=shape.norm_parameters * shape.hidden_size)


def layer_cost(shape: ModelShape, slots: LayerSlots) -> Cost:
    """Both slots of one layer, each with its norm."""
    entry = MIXERS[slots.mixer]
    mixer: Cost = load(entry.cost)(shape, entry.plugin or slots)
    channels = {"mlp": mlp_cost, "token_moe": token_moe_cost, "none": lambda _: Cost()}
    if slots.channel in CHANNELS:
        channel: Cost = load(PLUGIN_COST)(shape, CHANNELS[slots.channel])
        return mixer + channel
    return mixer + channels[slots.channel](shape)


def mlp_cost(shape: ModelShape) -> Cost:
    """Return the cost of the FFN; a gated one has two projections to the hidden layer."""
    hidden = shape.ffn_hidden_size
    up = column(shape, (1 + shape.gated_mlp) * hidden)
    kept = Cost(kept=(1 + shape.kept_by_activation) * hidden)
    return norm_cost(shape) + up + row(shape, hidden) + kept


def token_moe_cost(shape: ModelShape) -> Cost:
    """Router and experts (without bias); a token visits k of E experts, nothing is dropped, and the
    shared one."""
    k, expert = shape.moe_router_topk, _expert_parameters(shape)
    router = shape.hidden_size * shape.num_experts if shape.router_has_weights else 0
    routed = Cost(
        replicated=router,
        experts=shape.num_experts * expert,
        idle=(shape.num_experts - k) * expert,
        flops=2 * shape.seq_length * (k * expert + router),
        # The dispatched token, and its output unless the weight is fixed; the hidden layer up to
        # the activation and behind it. GShard's second expert is counted as if it always served.
        kept_at_experts=k * shape.hidden_size * (2 if shape.router_has_weights else 1),
        kept_in_experts=k * (1 + shape.kept_by_activation) * shape.moe_ffn_hidden_size,
    )
    return norm_cost(shape) + routed + shared_expert_cost(shape)


def shared_expert_cost(shape: ModelShape) -> Cost:
    """Return the cost of an FFN without bias that every token visits, if there is one."""
    width = shape.shared_expert_size
    parameters = (2 + shape.gated_mlp) * shape.hidden_size * width
    return Cost(
        sharded=parameters,
        pairs=int(width > 0),
        flops=2 * shape.seq_length * parameters,
        kept=(1 + shape.kept_by_activation) * width,
    )


def _expert_parameters(shape: ModelShape) -> int:
    widths = 3 if shape.gated_mlp else 2
    return widths * shape.hidden_size * shape.moe_ffn_hidden_size


def column(shape: ModelShape, outputs: int) -> Cost:
    """Return the cost of a projection from D, whose outputs are split."""
    flops = 2 * shape.seq_length * shape.hidden_size * outputs
    return Cost(sharded=outputs * (shape.hidden_size + shape.linear_bias), flops=flops)


def row(shape: ModelShape, inputs: int) -> Cost:
    """Return the cost of a projection to D, whose inputs are split."""
    flops = 2 * shape.seq_length * inputs * shape.hidden_size
    bias = shape.hidden_size if shape.linear_bias else 0
    return Cost(sharded=inputs * shape.hidden_size, replicated=bias, pairs=1, flops=flops)


def pairs(shape: ModelShape, columns: int) -> Cost:
    """Return the cost of a causal product of T x T with `columns` columns."""
    above = shape.square - shape.triangle
    return Cost(flops=2 * shape.triangle * columns, above_flops=2 * above * columns)
