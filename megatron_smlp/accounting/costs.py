"""Parameters and FLOPs of every architecture: plain arithmetic, no torch, no GPU.

FLOPs count 2 per multiply-add of the forward pass; training costs 3 x forward. Two conventions,
which differ only for causal products:

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
RULE_PARAMETERS = "megatron_smlp.accounting.plugin_costs:token_rule_parameters"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Parameters, FLOPs and saved activations of one part of the model, by how they are sharded."""

    sharded: int = 0
    """Parameters sharded over the tensor parallel (TP) group."""
    replicated: int = 0
    """Parameters that every rank of the TP group holds."""
    experts: int = 0
    """Parameters of token experts, sharded over the expert parallel group and within an expert."""
    idle: int = 0
    """Parameters of the experts that one token does not visit."""
    zero_parameters: int = 0
    """Parameters above the diagonals of spatial matrices, which stay zero and are never read."""
    summed: int = 0
    """Replicated parameters whose gradients each backward pass all-reduces over the TP group."""
    pairs: int = 0
    """Column-row projection pairs, whose outputs and input gradients the TP group sums."""
    flops: int = 0
    """Forward FLOPs of one sequence, in the `needed` convention."""
    above_flops: int = 0
    """FLOPs above the diagonals of causal products, which the full squares add."""
    kept: int = 0
    """Elements per token saved for the backward pass, besides the slot's input and the norm's
    output, sharded over the TP group."""
    recomputable: int = 0
    """The part of `kept` that --recompute-granularity selective drops and recomputes."""
    kept_by_split_norm: int = 0
    """As `kept`, for the norm of a single head split over ranks: once, and once in fp32."""
    kept_everywhere: int = 0
    """As `kept`, but replicated on every rank of the TP group."""
    kept_at_experts: int = 0
    """As `kept`, for an expert's input and output tokens, whole on each rank of that expert."""
    kept_in_experts: int = 0
    """As `kept`, but sharded within an expert."""

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
        """Parameters that one token's forward pass uses, zeros of spatial matrices included."""
        return self.parameters - self.idle


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes that determine a model's cost; names follow Megatron's arguments."""

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
    moe_ffn_hidden_size: int = 0
    moe_router_topk: int = 1
    options: ModelOptions = dataclasses.field(default_factory=ModelOptions)
    """Our model flags, for options that have no field here."""
    plugin_values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Values of the plugins' options, by name."""
    shared_expert_size: int = 0
    """Width of the shared expert, the FFN that every token visits; 0: none."""
    prefix_length: int = 0
    """P, the number of prefix tokens by which partial prediction routes; 0: no such routing."""
    num_feature_chunks: int = 0
    """C, the number of feature chunks that partial prediction routes."""
    num_positions: int = 0
    """Rows of the learned position table; 0: none."""
    rotary_positions: bool = False
    attention_window: int | None = None
    """Earlier positions that attention reads; None: all."""
    normed_head_width: int = 0
    """Width of the query norm and of the key norm; 0: none."""
    tied_embeddings: bool = True
    linear_bias: bool = True
    norm_parameters: int = 2
    """Parameter vectors of a norm: 2 for LayerNorm, 1 for RMSNorm."""
    gated_mlp: bool = False
    kept_by_activation: int = 1
    """Elements saved up to the activation, per element of an FFN's hidden layer."""

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> ModelShape:
        """Read Megatron's validated arguments, or any other object with the same attributes."""
        width = args.kv_channels * args.num_attention_heads
        groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
        options = options_of(args)
        # Arguments of Megatron's own script may have experts, but no rule of ours.
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
            moe_ffn_hidden_size=args.moe_ffn_hidden_size or args.ffn_hidden_size,
            moe_router_topk=experts_of_a_token(options.token_router, args.moe_router_topk),
            options=options,
            plugin_values={name: getattr(args, name) for name in PLUGIN_OPTIONS},
            shared_expert_size=args.moe_shared_expert_intermediate_size or 0 if num_experts else 0,
            prefix_length=options.prefix_length(args.seq_length),
            num_feature_chunks=options.num_chunks if is_partial else 0,
            num_positions=args.max_position_embeddings if positions == "learned_absolute" else 0,
            rotary_positions=positions == "rope",
            attention_window=_window(args.window_size),
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
        """Return whether the token router scores tokens with a weight matrix; Megatron's own, under
        a bare `--spec`, does."""
        rule = TOKEN_ROUTERS.get(self.options.token_router)
        return rule is None or rule.has_weights

    @property
    def square(self) -> int:
        return self.seq_length**2

    @property
    def matrix_parameters(self) -> int:
        """M and b of one spatial head or expert."""
        return self.seq_length + (1 if self.options.toeplitz else self.square)


def _window(given: str | tuple[int, int] | None) -> int | None:
    """Return how many tokens back a position attends to; None: all. A study's file and the record
    of a checkpoint hold Megatron's tuple as text."""
    text = str(given or (-1, 0)).strip("()")
    back = int(text.split(",")[0])
    return back if back >= 0 else None


def _kept_by_activation(args: argparse.Namespace) -> int:
    """Return the elements saved up to the activation, per element of its output: 1 without a gate;
    2 (both halves) for a fused SwiGLU; 4 for an unfused one, which also saves both factors of the
    product; 5 for a gated quick GELU, which also saves its sigmoid."""
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
    """Return the forward TFLOPs per 1024 tokens: (paper convention, needed only)."""
    scale = TOKENS_PER_REPORT / shape.seq_length / 1e12
    return cost.square_flops * scale, cost.flops * scale


def training_flops_per_token(cost: Cost, shape: ModelShape) -> tuple[float, float]:
    """Return the FLOPs of one token's forward and backward: (paper convention, needed only).

    Each token counts as many experts as its rule may send it to. A choice that training drops, or
    that GShard does not draw, saves 3 x `choice_flops`.
    """
    return 3 * cost.square_flops / shape.seq_length, 3 * cost.flops / shape.seq_length


def choice_flops(shape: ModelShape) -> int:
    """Return the forward FLOPs of one token in one of its experts."""
    return 2 * _expert_parameters(shape)


def choices_per_token(shape: ModelShape) -> int:
    """Return how many experts a token may be sent to, over all layers."""
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
    """Return the size in bytes of the minhash table, whose int32 values are not trained."""
    options = shape.options
    is_hashed = options.input_projection == "minhash"
    return 4 * shape.padded_vocab_size * options.hash_count * is_hashed


def token_table(shape: ModelShape) -> Cost:
    """Return the cost of the token embeddings, or of an untied output layer."""
    return Cost(sharded=shape.padded_vocab_size * shape.hidden_size)


def position_table(shape: ModelShape) -> Cost:
    """Return the cost of the position embeddings, if they are learned."""
    return Cost(replicated=shape.num_positions * shape.hidden_size)


def norm_cost(shape: ModelShape) -> Cost:
    """Return the cost of a norm over the hidden dimension."""
    return Cost(replicated=shape.norm_parameters * shape.hidden_size)


def layer_cost(shape: ModelShape, slots: LayerSlots) -> Cost:
    """Return the cost of both slots of one layer, each with its norm."""
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
    """Return the cost of the router, the experts (without bias) and the shared expert; each token
    visits k of E experts, and none are dropped."""
    k, expert = shape.moe_router_topk, _expert_parameters(shape)
    router = shape.hidden_size * shape.num_experts if shape.router_has_weights else 0
    rule = TOKEN_ROUTERS.get(shape.options.token_router)
    own: int = load(RULE_PARAMETERS)(shape, rule.plugin) if rule and rule.plugin else 0
    routed = Cost(
        replicated=router + own,
        summed=own,
        experts=shape.num_experts * expert,
        idle=(shape.num_experts - k) * expert,
        flops=2 * shape.seq_length * (k * expert + router),
        # The dispatched token, and its output unless the weight is fixed; the hidden layer before
        # and after the activation. GShard's second expert counts as always used.
        kept_at_experts=k * shape.hidden_size * (2 if shape.router_has_weights else 1),
        kept_in_experts=k * (1 + shape.kept_by_activation) * shape.moe_ffn_hidden_size,
    )
    return norm_cost(shape) + routed + shared_expert_cost(shape)


def shared_expert_cost(shape: ModelShape) -> Cost:
    """Return the cost of the shared expert, an FFN without bias, if there is one."""
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
    """Return the cost of a column parallel projection from D: its outputs are sharded."""
    flops = 2 * shape.seq_length * shape.hidden_size * outputs
    return Cost(sharded=outputs * (shape.hidden_size + shape.linear_bias), flops=flops)


def row(shape: ModelShape, inputs: int) -> Cost:
    """Return the cost of a row parallel projection to D: its inputs are sharded."""
    flops = 2 * shape.seq_length * inputs * shape.hidden_size
    bias = shape.hidden_size if shape.linear_bias else 0
    return Cost(sharded=inputs * shape.hidden_size, replicated=bias, pairs=1, flops=flops)


def pairs(shape: ModelShape, columns: int) -> Cost:
    """Return the cost of a causal T x T matrix times `columns` columns."""
    above = shape.square - shape.triangle
    return Cost(flops=2 * shape.triangle * columns, above_flops=2 * above * columns)
