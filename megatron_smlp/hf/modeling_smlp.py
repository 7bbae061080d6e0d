"""Sparse all-MLP language models and their baselines, for transformers: one self-contained file.

Every layer has two slots, each with a norm before it and a residual around it,

    x = x + mixer(LN(x))         attention | spatial gating | feature MoE | masked mixer
    x = x + channel(LN(x))       FFN | token MoE | nothing (then without its norm)

    architecture   mixer                                      channel
    transformer    attention                                  FFN; token MoE every moe_layer_freq-th
    gmlp, amlp     spatial gating (amlp: + tiny attention)    nothing; token MoE likewise
    smlp           spatial gating, then feature MoE           nothing, then token MoE
    mixer          masked mixer                               FFN; token MoE likewise

Sources: gMLP (arXiv 2105.08050), sparse all-MLP (2203.06850), Switch (2101.03961), GShard
(2006.16668), BASE (2103.16716), hash layers (2106.04426); of modern Transformers: RoPE
(2104.09864), RMSNorm (1910.07467), SwiGLU (2002.05202), grouped queries (2305.13245), shared
experts (2401.06066), the bias that balances without a loss (2408.15664); of an input without a
table, pNLP-Mixer (2202.04350). It is written from the equations, for reading: the triangle is
masked and multiplied densely, experts are a loop.

Positions are absolute and start at 0. Internally, every batch is padded on the right; tokens that
come padded on the left, as transformers' `generate` requires, are moved there and back.

Names here, under `model.layers.<i>.`, and in the Megatron model, under `decoder.layers.<i>.`; a
weight is [out, in] in both:

    mixer_norm                               input_layernorm
    mixer.{q,k,v}_proj                       self_attention.linear_qkv: per head its rows of q, k, v
    mixer.out_proj                           self_attention.linear_proj
    mixer.up_proj, mixer.down_proj           self_attention.linear_fc1, .linear_fc2
    mixer.gate_norm                          self_attention.norm
    mixer.spatial.weight, .bias              self_attention.spatial.weight, .bias
    mixer.spatial_out.weight, .bias          self_attention.spatial_out.weight, .bias
    channel_norm                             pre_mlp_layernorm
    channel.up_proj, channel.down_proj       mlp.linear_fc1, mlp.linear_fc2
    channel.router.weight                    mlp.router.weight
    channel.router.prices                    mlp.router.prices
    channel.router.expert_bias               mlp.router.expert_bias
    channel.shared_experts.{up,down}_proj    mlp.shared_experts.linear_fc{1,2}
    channel.experts.{up,down}_proj[e]        mlp.experts.local_experts.<e>.linear_fc{1,2}.weight

and `model.embed_tokens` (with minhash: its `.fingerprints`, `.norm` and `.proj`) is
`embedding.word_embeddings`, `model.embed_positions` `embedding.position_embeddings`,
`model.final_norm` `decoder.final_layernorm`. Without a counterpart in Megatron's own
layers: `mixer.tiny_attention.{q,k,v,out}_proj`, `mixer.prefix_router` <float>[P, E],
`channel.router.table` <int64>[V].

Letters: B batch, T tokens of this call, L tokens so far (with the cache), D hidden, V vocabulary,
F gate width, h heads, f = F/h, C chunks, E experts, X expert width, P prefix length, N = B T.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicLayer
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput, MoeCausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import can_return_tuple, maybe_autocast

from .configuration_smlp import SMLPConfig

logger = logging.get_logger(__name__)

AUTO_MAP = {
    "AutoModel": "modeling_smlp.SMLPModel",
    "AutoModelForCausalLM": "modeling_smlp.SMLPForCausalLM",
}
"""Maps transformers' Auto classes to this file's, in the config.json of a folder with its code."""


# ------------------------------------------------------------------------------------------------
# Where each token of a call stands, and what is kept between calls
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Positions of the tokens of one call; everything is padded on the right."""

    positions: Tensor
    """<int64>[B, T], absolute."""
    start: int | None
    """The position of the first token if all samples share it, else None."""
    valid: Tensor | None
    """<bool>[B, T], false on padding; None: no padding."""
    input_ids: Tensor | None
    """<int64>[B, T]; HASH routes by them."""
    end: int
    """L, one more than the last position."""
    cached: bool
    """Whether a cache is being filled; then capacity limits drop nothing."""

    @property
    def is_one_step(self) -> bool:
        """Whether each sample has one token, all at one position: it sees all and needs no mask."""
        return self.start is not None and self.end - self.start == 1

    def to(self, device: torch.device, non_blocking: bool = False) -> "Layout":
        """Return the layout on a device; accelerate calls this if layers are on several."""
        names = ("positions", "valid", "input_ids")
        tensors = {name: getattr(self, name) for name in names}
        moved = {
            n: t.to(device, non_blocking=non_blocking) for n, t in tensors.items() if t is not None
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class Move:
    """Moves the columns of a padded batch to the left, in front of the padding, and back."""

    order: Tensor
    """<int64>[B, K]: which column goes to each place; K: tokens of the longest sample, since what
    comes after them is only padding and takes no position."""
    back: Tensor
    """<int64>[B, T]: at which place each column's state is. Padding gets the state of the last
    token before it, so that the last column predicts the next token, whichever the side."""

    @classmethod
    def to_the_right(cls, mask: Tensor) -> "Move":
        """mask: <bool>[B, T], true on tokens; they keep their order, the padding goes right."""
        longest = max(1, int(mask.sum(dim=1).max()))
        order = (~mask).to(torch.int8).argsort(dim=1, stable=True)[:, :longest]
        return cls(order, (mask.cumsum(dim=1) - 1).clamp(min=0))


class SMLPCacheLayer(DynamicLayer):
    """States of one mixer by absolute position, in a buffer that doubles when it is full, up to
    `longest`, after which there are no positions.

    Attention keeps keys and values, spatial gating its normalized gate inputs as `keys`. Sums over
    all tokens so far are in `state`: partial prediction's routing scores <float>[B, C, E], or a
    plugin's own.
    """

    is_croppable = False

    def __init__(self, longest: float) -> None:
        super().__init__()
        self.longest, self.length = longest, 0
        self.state: dict[str, Tensor] = {}

    def write(self, keys: Tensor, values: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """keys, values: <float>[B, h, T, width] -> those of positions < L, [B, h, L, width]."""
        self.length = max(self.length, layout.end)
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self.keys, self.values = (self._empty(x, self.length) for x in (keys, values))
        elif self.length > self.keys.shape[2]:
            self.keys, self.values = (self._grown(x) for x in (self.keys, self.values))
        for buffer, new in ((self.keys, keys), (self.values, values)):
            if layout.start is not None:
                buffer[:, :, layout.start : layout.end] = new
            else:
                index = layout.positions[:, None, :, None].expand_as(new)
                buffer.scatter_(2, index, new)
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    @staticmethod
    def _empty(like: Tensor, length: int) -> Tensor:
        # Zeros: positions of a shorter sample that were never written must not turn into NaN.
        return like.new_zeros(*like.shape[:2], length, like.shape[3])

    def _grown(self, buffer: Tensor) -> Tensor:
        doubled = int(min(self.longest, 2 * buffer.shape[2]))
        grown = self._empty(buffer, max(self.length, doubled))
        grown[:, :, : buffer.shape[2]] = buffer
        return grown

    def get_seq_length(self) -> int:
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Raise ValueError: the states cannot forget tokens, as decoding with drafts would need."""
        raise ValueError("the states of this model forget no token: make a cache anew")

    def reset(self) -> None:
        super().reset()
        self.length, self.state = 0, {}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            super().batch_select_indices(indices.to(self.keys.device))
        self.state = {name: x[indices.to(x.device)] for name, x in self.state.items()}

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.state = {n: x.repeat_interleave(repeats, dim=0) for n, x in self.state.items()}


class SMLPCache(Cache):
    """The states of all mixers (some have two per layer), the ids of tokens that minhash rereads,
    and how many tokens each sample has."""

    def __init__(self, config: SMLPConfig) -> None:
        longest = math.inf if config.reads_any_length else config.max_position_embeddings
        num_states = config.states_per_layer * config.num_layers
        num_states += config.input_projection == "minhash"
        super().__init__(layers=[SMLPCacheLayer(longest) for _ in range(num_states)])
        self.num_columns = 0
        self.lengths: Tensor | None = None
        """<int64>[B], tokens of each sample; None: `num_columns` each."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the columns of `input_ids` so far, with padding: the unit of `generate`."""
        return self.num_columns

    def advance(self, num_columns: int, lengths: Tensor | None) -> None:
        self.num_columns += num_columns
        self.lengths = lengths

    def reset(self) -> None:
        super().reset()
        self.num_columns, self.lengths = 0, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        if self.lengths is not None:
            self.lengths = self.lengths[indices.to(self.lengths.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.lengths is not None:
            self.lengths = self.lengths.repeat_interleave(repeats, dim=0)


def so_far(states: Tensor, index: int, layout: Layout, cache: SMLPCache | None) -> Tensor:
    """[B, h, T, f] -> those of all positions so far, [B, h, L, f]; index: the cache's layer."""
    if cache is None:
        return states
    return cache.layers[index].write(states, states[..., :0], layout)[0]


# ------------------------------------------------------------------------------------------------
# Projections
# ------------------------------------------------------------------------------------------------

SHORT_ROW = 1024
"""Matrices with rows of up to this many numbers gain from `linear`'s path for one row."""


def starting_smaller(layer: Any, by: float) -> nn.Linear:
    """Return the projection, marked for `_init_weights` to draw it smaller by this factor.

    All projections are plain `nn.Linear`: what quantizes a model replaces exactly that class.
    """
    layer.std_divisor = by
    return layer


def to_residual(config: SMLPConfig, in_features: int, *, bias: bool) -> nn.Linear:
    """Return a projection whose output is added to the residual."""
    layer = nn.Linear(in_features, config.hidden_size, bias=bias)
    return starting_smaller(layer, math.sqrt(2 * config.num_layers))


def project(layer: nn.Module, hidden: Tensor) -> Tensor:
    """Return layer(hidden), faster at a generation step on a CPU; see `_one_row`.

    What quantizes, adapts, offloads or watches a projection replaces it or its call, or registers a
    hook: then the layer is called.
    """
    if type(layer) is nn.Linear and _is_step(hidden, layer.weight):
        is_watched = layer._forward_pre_hooks or layer._forward_hooks or "forward" in vars(layer)
        if not is_watched:
            return _one_row(hidden, layer.weight, layer.bias)
    return layer(hidden)


def linear(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute F.linear, faster for one row on a CPU."""
    if _is_step(hidden, weight):
        return _one_row(hidden, weight, bias)
    return F.linear(hidden, weight, bias)


def _one_row(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute F.linear of one row as a product with two equal rows, of which one is kept.

    Reading the weight takes all the time. BLAS's product with a single vector reads it in one
    thread, and slowly if rows are short; its product of matrices does neither (MKL on an AMD
    EPYC, in = 512: 1.8 times as fast with one thread, 3.3 times with two).
    """
    product = torch.mm(weight, hidden.reshape(1, -1).repeat(2, 1).T)[:, 0]
    product = product if bias is None else product + bias
    return product.view(*hidden.shape[:-1], -1)


def _is_step(hidden: Tensor, weight: Tensor) -> bool:
    """Return whether `hidden` is a single short row on a CPU and `weight` a plain tensor."""
    is_plain = hidden.device.type == "cpu" and hidden.dtype == torch.float32
    is_plain = is_plain and type(weight) in (Tensor, nn.Parameter)
    return is_plain and hidden.numel() == weight.shape[1] <= SHORT_ROW


# ------------------------------------------------------------------------------------------------
# The input
# ------------------------------------------------------------------------------------------------


class SMLPMinHashInput(nn.Module):
    """LN([C of token t-w | ... | C of token t]) W', in place of an embedding.

    C[j] is how many of a token's n values are j: `fingerprints` <int32>[V, n], n MinHash values of
    the token's string modulo m, computed in training from the tokenizer, saved with the weights.
    """

    def __init__(self, config: SMLPConfig) -> None:
        super().__init__()
        self.filter_size, self.window = config.filter_size, config.window
        num_features = (config.window + 1) * config.filter_size
        table = torch.zeros(config.vocab_size, config.hash_count, dtype=torch.int32)
        self.register_buffer("fingerprints", table)
        self.norm = nn.LayerNorm(num_features, eps=config.layer_norm_epsilon)
        proj = nn.Linear(num_features, config.hidden_size, bias=False)
        self.proj = starting_smaller(proj, math.sqrt(num_features))  # its features are normalized

    def forward(self, ids: Tensor, layout: Layout, cache: SMLPCache | None) -> Tensor:
        """ids: <int64>[B, T] of this call -> <float>[B, T, D]."""
        ids = so_far(ids[:, None, :, None], -1, layout, cache)[:, 0, :, 0]
        offsets = torch.arange(-self.window, 1, device=ids.device)
        places = layout.positions[:, :, None] + offsets
        seen = ids.gather(1, places.clamp(min=0).flatten(1)).view_as(places)
        values = self.fingerprints[seen].long()
        dtype = self.norm.weight.dtype  # a quantized projection's differs
        ones = (places >= 0)[..., None].to(dtype).expand(values.shape)
        counters = ones.new_zeros(*places.shape, self.filter_size).scatter_add(3, values, ones)
        return project(self.proj, self.norm(counters.flatten(2)))


# ------------------------------------------------------------------------------------------------
# Mixers: tokens see earlier tokens
# ------------------------------------------------------------------------------------------------


class SMLPAttention(nn.Module):
    """Causal self-attention: softmax(q k' / sqrt(d) + mask) v, over heads of width d = width / h.

    Args:
        num_groups: heads of keys and values, each for h / num_groups consecutive heads of queries;
            default: h.
        rotary_base: base of RoPE; None: queries and keys are not rotated.
        width: of all heads together.
        out_features: what the output projection maps to; default: D, to be added to the residual.
        normed: whether queries and keys have a norm over d.
    """

    def __init__(
        self,
        config: SMLPConfig,
        cache_index: int,
        *,
        num_heads: int,
        width: int,
        out_features: int | None = None,
        num_groups: int | None = None,
        rotary_base: int | None = None,
        normed: bool = False,
    ) -> None:
        super().__init__()
        bias = config.add_bias_linear
        self.num_heads, self.cache_index = num_heads, cache_index
        self.num_groups, self.rotary_base = num_groups or num_heads, rotary_base
        key_width = width // num_heads * self.num_groups
        self.dropout = config.attention_dropout
        self.q_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, key_width, bias=bias)
        head = width // num_heads
        self.q_norm = _build_norm(config, head) if normed else nn.Identity()
        self.k_norm = _build_norm(config, head) if normed else nn.Identity()
        self.out_proj = (
            nn.Linear(width, out_features, bias=bias)
            if out_features
            else to_residual(config, width, bias=bias)
        )

    def forward(
        self, hidden: Tensor, layout: Layout, cache: SMLPCache | None
    ) -> tuple[Tensor, Tensor | None]:
        """hidden: <float>[B, T, D] -> <float>[B, T, out_features], and no loss."""
        queries, keys, values = (
            project(layer, hidden).unflatten(-1, (heads, -1)).transpose(1, 2)
            for layer, heads in (
                (self.q_proj, self.num_heads),
                (self.k_proj, self.num_groups),
                (self.v_proj, self.num_groups),
            )
        )
        queries, keys = self.q_norm(queries), self.k_norm(keys)
        if self.rotary_base is not None:
            queries, keys = (rotated(x, layout, self.rotary_base) for x in (queries, keys))
        if cache is not None:
            keys, values = cache.layers[self.cache_index].write(keys, values, layout)
        is_causal = layout.start == 0
        needs_no_mask = is_causal or layout.is_one_step
        mixed = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=None if needs_no_mask else _visible(layout, keys.shape[2])[:, None],
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=is_causal,
            enable_gqa=self.num_groups != self.num_heads,
        )
        return project(self.out_proj, mixed.transpose(1, 2).flatten(2)), None


def _visible(layout: Layout, length: int) -> Tensor:
    """<bool>[B, T, L]: position s is visible from position t if s <= t."""
    columns = torch.arange(length, device=layout.positions.device)
    return columns <= layout.positions[:, :, None]


def rotated(states: Tensor, layout: Layout, base: int) -> Tensor:
    """RoPE: at position t, features i and i + d/2 of a head are rotated by t base^(-2i/d).

    states: <float>[B, h, T, d] -> the same shape and dtype.
    """
    half = states.shape[-1] // 2
    exponents = torch.arange(half, dtype=torch.float32, device=states.device) / half
    angles = layout.positions[:, None, :, None] * base**-exponents
    cos, sin = angles.cos().to(states.dtype), angles.sin().to(states.dtype)
    first, second = states.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class SMLPSpatialProjection(nn.Module):
    """Matrices M <float>[E, T, T] and biases b <float>[E, T] of all heads or experts of a layer.

    g[t] = sum over s <= t of M[t, s] v[s] + b[t]

    Args:
        bound: the largest initial |M[t, s]|; default: 1e-3 / T.
        start: the initial b.
    """

    def __init__(
        self, num_experts: int, length: int, *, bound: float | None = None, start: float = 1.0
    ) -> None:
        super().__init__()
        self.bound, self.start = bound or 1e-3 / length, start
        self.weight = nn.Parameter(torch.empty(num_experts, length, length))
        self.bias = nn.Parameter(torch.empty(num_experts, length))

    def rows(self, start: int, end: int) -> Tensor:
        """Rows of all M for the positions from `start` on, <float>[E, end - start, end]."""
        rows = self.weight[:, start:end, :end]
        return rows if end - start == 1 else rows.tril(start)

    def biases(self, start: int, end: int) -> Tensor:
        """<float>[E, end - start]; [E, 1] where all are the same."""
        return self.bias[:, start:end]

    def rows_at(self, experts: Tensor, positions: Tensor, length: int) -> Tensor:
        """One row for each expert and position, <float>[..., length], not masked yet."""
        return self.weight[experts, positions, :length]

    def biases_at(self, experts: Tensor, positions: Tensor) -> Tensor:
        return self.bias[experts, positions]

    def forward(
        self, values: Tensor, layout: Layout, mix: Callable[..., Tensor] | None = None
    ) -> Tensor:
        """Mix chunk i by expert i, or as `mix` does, a function of both other arguments.

        M and b are read only during this call, for which offloaded weights are loaded.
        values: <float>[B, E, L, f], all positions so far. Returns <float>[B, E, T, f].
        """
        if mix is not None:
            return mix(values, layout)
        start, end = layout.start, layout.end
        if start is None:
            experts = torch.arange(values.shape[1], device=values.device)
            return self.routed(values, experts[None, :, None], layout, None)
        # One new token costs one row; rows from 0 on cost the triangle.
        return self.rows(start, end) @ values + self.biases(start, end)[..., None]

    def routed(
        self, values: Tensor, experts: Tensor, layout: Layout, factor: Tensor | None
    ) -> Tensor:
        """Mix with any expert per sample, chunk and row: for the few rows of a generation step.

        values: <float>[B, C, L, f]; experts: <int64>, broadcastable to [B, C, T]; factor: <float>,
        broadcastable likewise, multiplies the products but not the bias.
        Returns <float>[B, C, T, f].
        """
        positions, length = layout.positions[:, None], values.shape[2]
        rows = self.rows_at(experts, positions, length)
        if not layout.is_one_step:
            rows = rows.masked_fill(~_visible(layout, length)[:, None], 0.0)
        if factor is not None:
            rows = rows * factor[..., None]
        return rows @ values + self.biases_at(experts, positions)[..., None]


class SMLPToeplitzProjection(SMLPSpatialProjection):
    """One weight per distance <float>[E, T] and one bias <float>[E, 1], for inputs of any length.

    g[t] = sum over k < T of m[k] v[t - k] + b
    """

    def __init__(
        self, num_experts: int, length: int, *, bound: float | None = None, start: float = 1.0
    ) -> None:
        super().__init__(num_experts, 1, bound=bound or 1e-3 / length, start=start)
        self.weight = nn.Parameter(torch.empty(num_experts, length))

    def rows(self, start: int, end: int) -> Tensor:
        positions = torch.arange(start, end, device=self.weight.device)
        experts = torch.arange(len(self.weight), device=self.weight.device)
        return self.rows_at(experts[:, None], positions[None], end)

    def biases(self, start: int, end: int) -> Tensor:
        return self.bias

    def rows_at(self, experts: Tensor, positions: Tensor, length: int) -> Tensor:
        distance = positions[..., None] - torch.arange(length, device=positions.device)
        longest = self.weight.shape[1]
        rows = self.weight[experts[..., None], distance.clamp(0, longest - 1)]
        return rows.masked_fill((distance < 0) | (distance >= longest), 0.0)

    def biases_at(self, experts: Tensor, positions: Tensor) -> Tensor:
        return self.bias[experts, 0]


class SMLPHeadNorm(nn.LayerNorm):
    """LayerNorm over each head's own features; weight and bias are [F]."""

    def forward(self, features: Tensor, heads: int) -> Tensor:
        """features: <float>[..., F] -> the same."""
        split = features.unflatten(-1, (heads, -1))
        normed = F.layer_norm(split, split.shape[-1:], eps=self.eps).flatten(-2)
        return normed * self.weight + self.bias


class SMLPSpatialGating(nn.Module):
    """Causal spatial gating, also the feature MoE with deterministic routing (one head per expert).

        u = GELU(x U) = [u1 | u2],    g = M_k LN_k(u2_k) + b_k  per head k,    y = (u1 * g) V

    amlp adds a small attention head over x to g.
    """

    def __init__(self, config: SMLPConfig, layer_index: int, *, num_heads: int, num_experts: int):
        super().__init__()
        bias, width = config.add_bias_linear, config.gate_width
        self.num_heads = num_heads
        self.cache_index = layer_index * config.states_per_layer
        self.activation = ACT2FN[config.hidden_act]
        self.up_proj = nn.Linear(config.hidden_size, 2 * width, bias=bias)
        self.gate_norm = SMLPHeadNorm(width, eps=config.layer_norm_epsilon)
        projection = SMLPToeplitzProjection if config.toeplitz else SMLPSpatialProjection
        self.spatial = projection(num_experts, config.max_position_embeddings)
        self.down_proj = to_residual(config, width, bias=bias)
        self.tiny_attention: SMLPAttention | None = None
        if config.architecture == "amlp":
            self.tiny_attention = SMLPAttention(
                config,
                self.cache_index + 1,
                num_heads=1,
                width=config.tiny_attention_width,
                out_features=width,
                rotary_base=config.turning_base,
            )

    def forward(
        self, hidden: Tensor, layout: Layout, cache: SMLPCache | None
    ) -> tuple[Tensor, Tensor | None]:
        """hidden: <float>[B, T, D] -> <float>[B, T, D], and the router's loss if it has one."""
        passed, gate = self.activation(project(self.up_proj, hidden)).chunk(2, dim=-1)
        chunks = self._split(self.gate_norm(gate, self.num_heads))
        gates, loss = self._mix(chunks, gate, layout, cache)
        gates = gates.transpose(1, 2).flatten(2)
        if self.tiny_attention is not None:
            gates = gates + self.tiny_attention(hidden, layout, cache)[0]
        return project(self.down_proj, passed * gates), loss

    def _split(self, features: Tensor) -> Tensor:
        """<float>[B, T, F] -> <float>[B, h, T, f]."""
        return features.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _mix(
        self, chunks: Tensor, gate: Tensor, layout: Layout, cache: SMLPCache | None
    ) -> tuple[Tensor, Tensor | None]:
        return self.spatial(so_far(chunks, self.cache_index, layout, cache), layout), None


class SMLPPartialPrediction(SMLPSpatialGating):
    """Feature MoE routed from the first P tokens: chunk i of a sample goes to expert e(i).

        a_i = sum over t < P of  W_r[t] * (mean of chunk i of u2[t]),    p_i = softmax(a_i)
        e(i) = argmax p_i,    s_i = E p_i[e(i)]                           (1 where p is uniform)
        row t >= P:  g_i = s_i M_e(i) LN(u2_i) + b_e(i)
        row t <  P:  the same with e(i) = i mod E and s_i = 1, since these rows must not see all P

    The mean is over u2 before its LayerNorm: with initial weights, that of a chunk normalized by
    itself is the same for every input, and would route nothing. A sample shorter than P never
    routes.
    Balance loss over the (sample, chunk) choices: E sum_e f_e P_e, as Switch's.
    """

    def __init__(self, config: SMLPConfig, layer_index: int) -> None:
        super().__init__(
            config,
            layer_index,
            num_heads=config.num_chunks,
            num_experts=config.num_feature_experts,
        )
        self.num_experts = config.num_feature_experts
        self.loss_coeff, self.prefix = config.feature_aux_loss_coeff, config.prefix_length
        self._build(config)

    def _build(self, config: SMLPConfig) -> None:
        self.prefix_router = nn.Parameter(torch.empty(self.prefix, self.num_experts))

    def _mix(
        self, chunks: Tensor, gate: Tensor, layout: Layout, cache: SMLPCache | None
    ) -> tuple[Tensor, Tensor | None]:
        scores = self._scores(gate, layout, cache)
        probabilities = scores.softmax(dim=-1)
        chosen, scale = self._chosen(scores, probabilities)
        scale = scale.to(chunks.dtype)
        values = so_far(chunks, self.cache_index, layout, cache)
        mix = self._mix_from_zero if layout.start == 0 else self._mix_step
        mixed = self.spatial(values, layout, partial(mix, chosen=chosen, scale=scale))
        return mixed, self._balance_loss(probabilities, chosen, layout)

    def _scores(self, gate: Tensor, layout: Layout, cache: SMLPCache | None) -> Tensor:
        """gate: <float>[B, T, F]. Returns a: <fp32>[B, C, E], over the prefix tokens so far."""
        before = None if cache is None else cache.layers[self.cache_index].state.get("scores")
        with maybe_autocast(gate.device.type, enabled=False):
            if before is not None and layout.start is not None and layout.start >= self.prefix:
                return self._scored(before)
            means = self._split(gate).float().mean(dim=-1)
            counts = layout.positions < self.prefix
            if layout.valid is not None:
                counts = counts & layout.valid
            scores = self._of_prefix(means, layout.positions.clamp(max=self.prefix - 1), counts)
            if cache is not None:
                scores = scores if before is None else before + scores
                cache.layers[self.cache_index].state["scores"] = scores
            return self._scored(scores)

    def _of_prefix(self, means: Tensor, places: Tensor, counts: Tensor) -> Tensor:
        """Return what is summed over the calls of a prefix, and cached: the scores.

        means: <fp32>[B, C, T]; places: <int64>[B, T], under P; counts: <bool>[B, T], which count.
        """
        weights = self.prefix_router.float()[places]
        return torch.einsum("bct,bte->bce", means, weights * counts[..., None])

    def _scored(self, kept: Tensor) -> Tensor:
        """Return the scores, <fp32>[B, C, E], from what is cached."""
        return kept

    def _chosen(self, scores: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """Return e(i), <int64>[B, C], and s_i, <fp32>[B, C]."""
        largest, experts = probabilities.max(dim=-1)
        return experts, largest * self.num_experts

    def _default_experts(self, device: torch.device) -> Tensor:
        return torch.arange(self.num_heads, device=device) % self.num_experts

    def _mix_from_zero(
        self, values: Tensor, layout: Layout, *, chosen: Tensor, scale: Tensor
    ) -> Tensor:
        """Mix whole sequences: every chunk by the experts of its two parts.

        values: <float>[B, C, T, f]; chosen: <int64>[B, C]; scale: <float>[B, C].
        """
        default = self._default_experts(values.device)
        prefix, end = min(self.prefix, layout.end), layout.end
        weight = self.spatial.rows(0, end)
        head = weight[default, :prefix, :prefix] @ values[:, :, :prefix]
        head = head + self.spatial.biases(0, prefix)[default, :, None]
        tail = values.new_empty(*values.shape[:2], end - prefix, values.shape[3])
        for expert in range(self.num_experts):
            own = chosen == expert
            rows = weight[expert, prefix:] @ values[own] * scale[own][:, None, None]
            tail[own] = rows + self.spatial.biases(prefix, end)[expert, :, None]
        return torch.cat([head, tail], dim=2)

    def _mix_step(self, values: Tensor, layout: Layout, *, chosen: Tensor, scale: Tensor) -> Tensor:
        """Mix a few new rows: same arguments, values [B, C, L, f]; return [B, C, T, f]."""
        prefix = self.prefix
        experts, factor = chosen[..., None], scale[..., None]
        if layout.start is None or layout.start < prefix:
            routed = (layout.positions >= prefix)[:, None]
            default = self._default_experts(values.device)
            experts = torch.where(routed, experts, default[:, None])
            factor = torch.where(routed, factor, torch.ones_like(factor))
        return self.spatial.routed(values, experts, layout, factor)

    def _balance_loss(self, probabilities: Tensor, chosen: Tensor, layout: Layout) -> Tensor | None:
        if not self.training:
            return None
        # Only samples that have tokens after the prefix made a choice that counts.
        routed = layout.positions >= self.prefix
        if layout.valid is not None:
            routed = routed & layout.valid
        routed = routed.any(dim=1)
        probabilities, chosen = probabilities[routed].flatten(0, 1), chosen[routed].flatten()
        if chosen.numel() == 0:
            return None
        return self.loss_coeff * _balance(probabilities, chosen)


class SMLPMaskedMixer(nn.Module):
    """Mixes each head's tokens by position: M_k x_k + c_k, k = 1..h, x_k its D/h features.

    With mixer_expansion M2_k GELU(M_k x_k + c_k) + c2_k. Source: masked mixers (2409.01482).
    """

    def __init__(self, config: SMLPConfig, layer_index: int) -> None:
        super().__init__()
        self.num_heads = config.spatial_heads
        self.cache_index = layer_index * config.states_per_layer
        self.activation = ACT2FN[config.hidden_act]
        projection = SMLPToeplitzProjection if config.toeplitz else SMLPSpatialProjection
        length = config.max_position_embeddings
        wide = math.sqrt(3 / length) if config.mixer_expansion else None
        self.spatial = projection(self.num_heads, length, bound=wide, start=0.0)
        self.spatial_out: SMLPSpatialProjection | None = None
        if config.mixer_expansion:
            self.spatial_out = projection(self.num_heads, length, start=0.0)

    def forward(
        self, hidden: Tensor, layout: Layout, cache: SMLPCache | None
    ) -> tuple[Tensor, Tensor | None]:
        """hidden: <float>[B, T, D] -> <float>[B, T, D], and no loss."""
        chunks = hidden.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        mixed = self.spatial(so_far(chunks, self.cache_index, layout, cache), layout)
        if self.spatial_out is not None:
            inner = so_far(self.activation(mixed), self.cache_index + 1, layout, cache)
            mixed = self.spatial_out(inner, layout)
        return mixed.transpose(1, 2).flatten(2), None


def rows_of_call(sums: Tensor, layout: Layout) -> Tensor:
    """Map sums [B, L, N] of all positions so far to those of this call's tokens, [B, T, N]."""
    if layout.start is not None:
        return sums[:, layout.start : layout.end]
    return sums.take_along_dim(layout.positions[..., None], dim=1)


# ------------------------------------------------------------------------------------------------
# Channel mixers: each token by itself
# ------------------------------------------------------------------------------------------------


def swiglu(hidden: Tensor) -> Tensor:
    """silu(a) b of the halves: <float>[..., 2 Z] -> <float>[..., Z]."""
    first, second = hidden.chunk(2, dim=-1)
    return F.silu(first) * second


class SMLPFeedForward(nn.Module):
    """f(h) = GELU(h A) B, or with swiglu (silu(h A) * h A') B, with A and A' side by side.

    Args:
        width: Z.
    """

    def __init__(self, config: SMLPConfig, *, width: int, bias: bool) -> None:
        super().__init__()
        self.activation = swiglu if config.swiglu else ACT2FN[config.hidden_act]
        self.up_proj = nn.Linear(config.hidden_size, (1 + config.swiglu) * width, bias=bias)
        self.down_proj = to_residual(config, width, bias=bias)

    def forward(
        self, hidden: Tensor, layout: Layout, residual: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """hidden: <float>[B, T, D] -> <float>[B, T, D], and no loss."""
        return project(self.down_proj, self.activation(project(self.up_proj, hidden))), None


class SMLPExperts(nn.Module):
    """Sums over the chosen experts of w_e f_e(h),  f_e(h) = GELU(h A_e) B_e.

    Experts have no biases: the router's weight would scale them too. They are called once per
    layer, so that offloaded weights are loaded once.
    """

    def __init__(self, config: SMLPConfig) -> None:
        super().__init__()
        self.activation = swiglu if config.swiglu else ACT2FN[config.hidden_act]
        num_experts, width, hidden = config.num_experts, config.expert_width, config.hidden_size
        self.up_proj = nn.Parameter(torch.empty(num_experts, (1 + config.swiglu) * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden, width))

    def forward(self, tokens: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """tokens: <float>[n, D]; experts: <int64>[n, k], -1 for none; weights: <float>[n, k].

        Returns <float>[n, D], zeros for tokens without an expert.
        """
        if len(tokens) == 1:
            return self._one_token(tokens, experts, weights)
        output = torch.zeros_like(tokens)
        for expert in experts.unique().tolist():  # a generation step leaves most idle
            if expert < 0:
                continue
            rows, choice = (experts == expert).nonzero(as_tuple=True)
            weighted = self._expert(tokens[rows], expert)
            weighted = weighted * weights[rows, choice, None].to(weighted.dtype)
            output.index_add_(0, rows, weighted.to(output.dtype))  # autocast's dtype differs
        return output

    def _one_token(self, token: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """Do the same for a single token, as in generation, without sorting and scattering."""
        scale = weights.to(token.dtype)[0]
        chosen = [
            self._expert(token, expert) * scale[place]
            for place, expert in enumerate(experts[0].tolist())
            if expert >= 0
        ]
        return torch.stack(chosen).sum(dim=0) if chosen else torch.zeros_like(token)

    def _expert(self, tokens: Tensor, expert: int) -> Tensor:
        """tokens: <float>[n, D] -> <float>[n, D]."""
        return linear(self.activation(linear(tokens, self.up_proj[expert])), self.down_proj[expert])


@dataclass(frozen=True)
class Routing:
    """The k choices of each of n tokens; choice 0 is the first."""

    experts: Tensor
    """<int64>[n, k]; -1: no expert, the token takes only the residual."""
    weights: Tensor
    """<float>[n, k]."""
    loss: Tensor | None = None
    """The balance loss, with its coefficient; training only."""
    scores: Tensor | None = None
    """<fp32>[n, E], for the z loss; None: the router has none."""


class SMLPTokenMoE(nn.Module):
    """y = sum over the chosen experts of  w_e f_e(h),  and f(h) of a shared expert if there is one.

    Tokens are routed in the order of their positions, then of their samples: the order in which a
    capacity limit with drop policy `position` fills the slots. Padding is never routed or counted.
    """

    def __init__(self, config: SMLPConfig) -> None:
        super().__init__()
        self.experts = SMLPExperts(config)
        build_router = _ROUTERS.get(config.token_router) or HOSTED["router"]
        self.router: Any = build_router(config)
        self.z_loss_coeff = config.moe_z_loss_coeff
        is_base = config.token_router == "base"
        self.routes_on_residual = is_base and config.base_routing_input == "residual"
        self.shared_experts: SMLPFeedForward | None = None
        if config.moe_shared_expert_intermediate_size:
            width = config.moe_shared_expert_intermediate_size
            self.shared_experts = SMLPFeedForward(config, width=width, bias=False)

    def forward(
        self, hidden: Tensor, layout: Layout, residual: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """hidden (the norm of residual), residual: <float>[B, T, D] -> <float>[B, T, D], and the
        router's loss if it has one."""
        output, loss = self._routed(hidden, layout, residual)
        if self.shared_experts is not None:
            output = output + self.shared_experts(hidden, layout, residual)[0]
        return output, loss

    def _routed(
        self, hidden: Tensor, layout: Layout, residual: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        seen = residual if self.routes_on_residual else hidden
        tokens, seen = (states.transpose(0, 1).flatten(0, 1) for states in (hidden, seen))
        ids = None if layout.input_ids is None else layout.input_ids.T.flatten()
        real: Any = slice(None)
        if layout.valid is not None:
            real = layout.valid.T.flatten().nonzero()[:, 0]
        ids = None if ids is None else ids[real]
        routing = self.router(seen[real], ids, limited=not layout.cached)
        output = self.experts(tokens[real], routing.experts, routing.weights)
        if layout.valid is not None:
            output = torch.zeros_like(tokens).index_copy(0, real, output.to(tokens.dtype))
        loss = _add(routing.loss, self._z_loss(routing.scores))
        return output.unflatten(0, (hidden.shape[1], -1)).transpose(0, 1), loss

    def _z_loss(self, scores: Tensor | None) -> Tensor | None:
        """Return z mean_t (log sum_e exp s_te)^2, which keeps scores s small: <fp32>[n, E]."""
        if scores is None or not (self.z_loss_coeff and self.training and len(scores)):
            return None
        return self.z_loss_coeff * scores.logsumexp(dim=-1).square().mean()


def _in_fp32(tokens: Tensor, weight: Tensor) -> Tensor:
    """tokens: <float>[n, D]; weight: <float>[E, D] -> <fp32>[n, E], under autocast too."""
    with maybe_autocast(tokens.device.type, enabled=False):
        return F.linear(tokens.float(), weight.float())


class SMLPSwitchRouter(nn.Module):
    """p = softmax(h W); one expert, argmax p, with weight p_max.

    Capacity ceil(c N / E). Loss a E sum_e f_e P_e: f_e the share of tokens that want e, before any
    is dropped, P_e the mean of p_e.
    """

    def __init__(self, config: SMLPConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts or 1
        self.loss_coeff = config.moe_aux_loss_coeff
        self.train_capacity = config.moe_train_capacity_factor
        self.eval_capacity = config.moe_eval_capacity_factor
        self.drops_by_probability = config.moe_drop_policy == "probs"
        self.weight = nn.Parameter(torch.empty(self.num_experts, config.hidden_size))

    def forward(self, tokens: Tensor, ids: Tensor | None, *, limited: bool) -> Routing:
        """tokens: <float>[n, D]; ids: <int64>[n]; limited: whether capacity may drop tokens."""
        scores = _in_fp32(tokens, self.weight)
        probabilities = scores.softmax(dim=-1)
        loss = None
        if self.training and len(tokens):
            loss = self.loss_coeff * _balance(probabilities, probabilities.argmax(dim=-1))
        weights, experts = self._choose(probabilities)
        factor = self.train_capacity if self.training else self.eval_capacity
        if limited and factor is not None:
            experts = self._drop(experts, probabilities, self._capacity(factor, len(tokens)))
        return Routing(experts, weights, loss, scores)

    def _choose(self, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """<fp32>[n, E] -> weights <fp32>[n, k], experts <int64>[n, k]."""
        return probabilities.max(dim=-1, keepdim=True)

    def _capacity(self, factor: float, num_tokens: int) -> int:
        return math.ceil(factor * num_tokens / self.num_experts)

    def _drop(self, experts: Tensor, probabilities: Tensor, capacity: int) -> Tensor:
        """Replace choices over the capacity by -1; first choices come before second ones."""
        choices = experts.T.flatten()
        order = torch.arange(len(choices), device=choices.device)
        if self.drops_by_probability:
            wanted = probabilities.gather(1, experts.clamp(min=0)).T
            order = wanted.argsort(dim=1, descending=True, stable=True)
            order = order + len(experts) * torch.arange(len(order), device=order.device)[:, None]
            order = order.flatten()
        queue = F.one_hot(choices[order] + 1, self.num_experts + 1).cumsum(dim=0)
        place = queue.gather(1, choices[order][:, None] + 1)[:, 0]
        kept = torch.empty_like(choices, dtype=torch.bool)
        kept[order] = place <= capacity
        return torch.where(kept, choices, -1).unflatten(0, (experts.shape[1], -1)).T


class SMLPGShardRouter(SMLPSwitchRouter):
    """p = softmax(h W); two experts with weights g1/(g1+g2), g2/(g1+g2).

    In training the second is used with probability min(1, 2 g2 / (g1+g2)), in evaluation always;
    gshard_second_expert has other rules. `draw` (<fp32>[n] -> <fp32>[n] in [0, 1)) may be replaced.
    Capacity ceil(2 c ceil(N / E)). The loss is Switch's, over first choices.
    """

    def __init__(self, config: SMLPConfig) -> None:
        super().__init__(config)
        self.second_expert = config.gshard_second_expert
        self.draw: Any = torch.rand_like

    def _choose(self, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        gates, experts = probabilities.topk(2, dim=-1)
        weights = gates / gates.sum(dim=-1, keepdim=True)
        if self.training and self.second_expert != "all":
            second = (weights if self.second_expert == "paper" else gates)[:, 1]
            used = self.draw(second) < 2 * second
            sent = torch.where(used, experts[:, 1], -1)
            experts = torch.stack([experts[:, 0], sent], dim=1)
        return weights, experts

    def _capacity(self, factor: float, num_tokens: int) -> int:
        return math.ceil(2 * factor * math.ceil(num_tokens / self.num_experts))


class _WithBuffersInFp32(nn.Module):
    """Keeps its buffers in fp32, like scores, when the model is cast, on any device."""

    def _apply(self, fn: Any, recurse: bool = True) -> "_WithBuffersInFp32":
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = self._buffers[name]
            self._buffers[name] = moved.float() if buffer.is_meta else buffer.to(moved.device)
        return self


class SMLPBaseRouter(_WithBuffersInFp32):
    """One expert with weight sigmoid(x . w_e): the gradient reaches w_e only through the sigmoid.
    x is the residual, with base_routing_input=norm its norm.

    In training every expert gets floor or ceil of n/E tokens, by `assign`; in evaluation the expert
    is argmax x . w_e, or with base_eval=prices argmax x . w_e - p_e, p the mean prices of
    training. `assign` (<float>[n, E] -> <int64>[n] and prices <float>[E]) is simple and balanced
    but only nearly optimal; any solver of the linear assignment problem may replace it.

    With base_gate=price evaluation is by p too, and the weight is the sigmoid of x . w_e - p_e less
    its mean over the experts. In training p are the prices of the batch, and the gradient omits
    the part that would add the same to all scores of an expert.
    """

    prices: Tensor

    def __init__(self, config: SMLPConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts or 1
        self.assign: Any = priced_greedy
        self.gate_is_priced = config.base_gate == "price"
        self.by_price = config.base_eval == "prices" or self.gate_is_priced
        self.weight = nn.Parameter(torch.empty(self.num_experts, config.hidden_size))
        self.register_buffer("prices", torch.empty(self.num_experts))

    def forward(self, tokens: Tensor, ids: Tensor | None, *, limited: bool) -> Routing:
        """See SMLPSwitchRouter.forward."""
        scores = gates = _in_fp32(tokens, self.weight)
        experts, prices = self._choose(scores.detach())
        if self.gate_is_priced:
            if self.training:
                mean = gates.mean(dim=0)
                gates = gates - mean + mean.detach()
            gates = gates - prices
            gates = gates - gates.mean(dim=1, keepdim=True)
        experts = experts[:, None]
        return Routing(experts, gates.gather(1, experts).sigmoid(), scores=scores)

    def _choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """<fp32>[n, E] -> <int64>[n], and the prices used: <fp32>[E]."""
        if self.training:
            return self.assign(scores)
        prices = self.prices if self.by_price else scores.new_zeros(self.num_experts)
        return (scores - prices).argmax(dim=-1), prices


class SMLPHashRouter(nn.Module):
    """One expert with weight 1: table[token id]. No parameters, no loss."""

    table: Tensor

    def __init__(self, config: SMLPConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts or 1
        self.seed = config.hash_seed
        self.register_buffer("table", torch.empty(config.vocab_size, dtype=torch.int64))

    def resize(self, vocab_size: int) -> None:
        """Keep the experts of ids that stay; new ids draw theirs."""
        old = self.table
        self.table = old.new_empty(vocab_size)
        self.table.copy_(self.random_table())
        self.table[: len(old)] = old[:vocab_size]

    def random_table(self) -> Tensor:
        """<int64>[V], the same in every layer and on every machine."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = self.table.shape
        return torch.randint(self.num_experts, shape, generator=generator, device="cpu")

    def forward(self, tokens: Tensor, ids: Tensor | None, *, limited: bool) -> Routing:
        """See SMLPSwitchRouter.forward.

        Raises:
            ValueError: the model was given embeddings instead of token ids.
        """
        if ids is None:
            raise ValueError("token_router=hash routes by token ids: give input_ids")
        experts = self.table[ids][:, None]
        return Routing(experts, tokens.new_ones(experts.shape))


class SMLPTopKRouter(_WithBuffersInFp32):
    """The k experts of the largest scores, s = softmax(h W) or sigmoid(h W), with weights whose sum
    is 1: w_e = s_e / sum over the chosen of s, times moe_router_topk_scaling_factor. A token with
    one expert has w_e = s_e.

    With moe_router_num_groups G they are chosen among the experts of moe_router_group_topk = g of G
    groups of consecutive experts: those with the largest sum of k / g best (of h W, with softmax).
    With moe_router_enable_expert_bias the k are those of the largest s + b; b is not part of w, and
    training moves it by the experts' load (Megatron does; here it is kept as it is).
    Loss a E sum_e f_e P_e: f_e the share of the choices by s alone, P_e the mean of s / sum_e s.
    """

    expert_bias: Tensor

    def __init__(self, config: SMLPConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts or 1
        self.num_choices = config.moe_router_topk or 1
        self.loss_coeff = config.moe_aux_loss_coeff
        self.is_sigmoid = config.moe_router_score_function == "sigmoid"
        self.scale = config.moe_router_topk_scaling_factor or 1
        self.num_groups = config.moe_router_num_groups or 1
        self.group_choices = config.moe_router_group_topk or 1
        self.has_bias = config.moe_router_enable_expert_bias
        self.weight = nn.Parameter(torch.empty(self.num_experts, config.hidden_size))
        if self.has_bias:
            self.register_buffer("expert_bias", torch.empty(self.num_experts))

    def forward(self, tokens: Tensor, ids: Tensor | None, *, limited: bool) -> Routing:
        """See SMLPSwitchRouter.forward; nothing is ever dropped."""
        logits = _in_fp32(tokens, self.weight)
        scores = logits.sigmoid() if self.is_sigmoid else logits.softmax(dim=-1)
        preferred = scores if self.is_sigmoid else logits
        preferred = preferred + self.expert_bias if self.has_bias else preferred
        experts = self._in_best_groups(preferred).topk(self.num_choices, dim=-1).indices
        weights = scores.gather(1, experts)
        if self.num_choices > 1:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return Routing(experts, weights * self.scale, self._loss(scores), logits)

    def _in_best_groups(self, scores: Tensor) -> Tensor:
        """<float>[n, E] -> the same, -inf for experts of other groups."""
        if self.num_groups == 1:
            return scores
        groups = scores.unflatten(1, (self.num_groups, -1))
        best = groups.topk(self.num_choices // self.group_choices, dim=-1).values.sum(dim=-1)
        chosen = best.topk(self.group_choices, dim=-1).indices
        others = torch.ones_like(best, dtype=torch.bool).scatter(1, chosen, False)
        return groups.masked_fill(others[..., None], -torch.inf).flatten(1)

    def _loss(self, scores: Tensor) -> Tensor | None:
        if not (self.training and len(scores) and self.loss_coeff):
            return None
        choices = scores.topk(self.num_choices, dim=-1).indices
        shares = scores / scores.sum(dim=-1, keepdim=True)
        return self.loss_coeff * _balance(shares, choices.flatten())


_ROUTERS: dict[str, type[nn.Module]] = {
    "switch": SMLPSwitchRouter,
    "gshard": SMLPGShardRouter,
    "base": SMLPBaseRouter,
    "hash": SMLPHashRouter,
    "topk": SMLPTopKRouter,
}


def _balance(probabilities: Tensor, chosen: Tensor) -> Tensor:
    """E sum_e f_e P_e, 1 where uniform. probabilities: <fp32>[n, E]; chosen: <int64>[n]."""
    num_experts = probabilities.shape[1]
    share = chosen.bincount(minlength=num_experts).to(probabilities.dtype) / len(chosen)
    return num_experts * (share * probabilities.mean(dim=0)).sum()


def priced_greedy(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Run `balanced_greedy` at prices that nearly balance by themselves: each rises by the log of
    its expert's load, as tokens prefer experts at a falling temperature.

    scores: <fp32>[n, E]. Returns experts <int64>[n] and prices <fp32>[E].
    """
    num_tokens, num_experts = scores.shape
    prices = scores.new_zeros(num_experts)
    spread = (scores - scores.mean(dim=0)).abs().sum() / max(1, scores.numel()) + 1e-6
    for level in range(12):
        temperature = 4 * spread / 2**level
        for _ in range(8):
            load = ((scores - prices) / temperature).softmax(dim=-1).sum(dim=0)
            share = (load * num_experts / max(1, num_tokens)).clamp(min=1e-6)
            prices = prices + temperature * share.log()
    return balanced_greedy(scores - prices), prices


def balanced_greedy(scores: Tensor) -> Tensor:
    """Let every token apply to its best expert with room, which takes the largest leads.

    scores: <fp32>[n, E]. Returns <int64>[n]: each expert floor or ceil of n/E times. It ends, since
    only experts that are full from then on turn tokens away.
    """
    num_tokens, num_experts = scores.shape
    share, remainder = divmod(num_tokens, num_experts)
    room = torch.full((num_experts,), share, device=scores.device)
    room[scores.mean(dim=0).argsort(descending=True, stable=True)[:remainder]] += 1
    experts = torch.full((num_tokens,), -1, device=scores.device)
    while (waiting := (experts < 0).nonzero()[:, 0]).numel():
        open_scores = scores[waiting].masked_fill(room == 0, -torch.inf)
        best = open_scores.topk(min(2, num_experts), dim=1)
        order = (best.values[:, 0] - best.values[:, -1]).argsort(descending=True, stable=True)
        choice = best.indices[order, 0]
        place = F.one_hot(choice, num_experts).cumsum(dim=0).gather(1, choice[:, None])[:, 0]
        taken = place <= room[choice]
        experts[waiting[order[taken]]] = choice[taken]
        room = room - choice[taken].bincount(minlength=num_experts)
    return experts


# ------------------------------------------------------------------------------------------------
# The model
# ------------------------------------------------------------------------------------------------


def _attention(config: SMLPConfig, index: int) -> nn.Module:
    return SMLPAttention(
        config,
        index * config.states_per_layer,
        num_heads=config.num_attention_heads,
        width=config.hidden_size,
        num_groups=config.num_query_groups,
        rotary_base=config.turning_base,
        normed=config.qk_layernorm,
    )


def _spatial_gating(config: SMLPConfig, index: int) -> nn.Module:
    if config.is_sparse_layer(index) and config.routes_by_prefix:
        is_ours = config.feature_router == "partial"
        kind = SMLPPartialPrediction if is_ours else HOSTED["features"]
        return kind(config, index)
    is_routed = config.is_sparse_layer(index) and config.feature_router == "deterministic"
    heads = config.num_feature_experts if is_routed else config.spatial_heads
    return SMLPSpatialGating(config, index, num_heads=heads, num_experts=heads)


_MIXERS: dict[str, Any] = {
    "attention": _attention,
    "spatial_gating": _spatial_gating,
    "masked_mixer": SMLPMaskedMixer,
}
"""Functions that build the mixer of a layer from the configuration and the layer's number, by its
name in Megatron's model."""


class _Hosted(dict[str, Any]):
    def __missing__(self, part: str) -> Any:
        raise ValueError(
            f"the model has a plugin's {part}, whose code is in its folder: load it with "
            "trust_remote_code=True where megatron_smlp.hf is not imported"
        )


HOSTED = _Hosted()
"""Functions that build what plugins bring: modeling_plugin.py adds them."""


def _build_mixer(config: SMLPConfig, index: int) -> nn.Module:
    name, _ = config.slots(index)
    return _MIXERS[name](config, index) if name in _MIXERS else HOSTED["mixer"](config, index, name)


def _build_channel(config: SMLPConfig, index: int) -> nn.Module | None:
    if config.has_token_moe(index):
        return SMLPTokenMoE(config)
    _, name = config.slots(index)
    if name == "none":
        return None
    if name != "mlp":
        return HOSTED["channel"](config, index, name)
    return SMLPFeedForward(config, width=config.ffn_hidden_size, bias=config.add_bias_linear)


def _build_norm(config: SMLPConfig, width: int | None = None) -> nn.Module:
    kind = nn.RMSNorm if config.normalization == "RMSNorm" else nn.LayerNorm
    return kind(width or config.hidden_size, eps=config.layer_norm_epsilon)


class SMLPLayer(GradientCheckpointingLayer):
    """Norm, mixer, residual; norm, channel mixer, residual."""

    def __init__(self, config: SMLPConfig, index: int) -> None:
        super().__init__()
        self.dropout = config.hidden_dropout
        self.mixer_norm = _build_norm(config)
        self.mixer = _build_mixer(config, index)
        self.channel = _build_channel(config, index)
        if self.channel is not None:
            self.channel_norm = _build_norm(config)

    def forward(
        self, hidden: Tensor, layout: Layout, cache: SMLPCache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """hidden: <float>[B, T, D] -> <float>[B, T, D], and the sum of the routers' losses."""
        mixed, loss = self.mixer(self.mixer_norm(hidden), layout, cache)
        hidden = hidden + F.dropout(mixed, self.dropout, self.training)
        if self.channel is None:
            return hidden, loss
        mixed, channel_loss = self.channel(self.channel_norm(hidden), layout, hidden)
        hidden = hidden + F.dropout(mixed, self.dropout, self.training)
        return hidden, _add(loss, channel_loss)


def _add(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    if left is None or right is None:
        return right if left is None else left
    return left + right.to(left.device)


@dataclass
class SMLPModelOutput(ModelOutput):
    """States after the final norm, the routers' summed losses, the cache, each layer's states."""

    last_hidden_state: Tensor | None = None
    aux_loss: Tensor | None = None
    cache: SMLPCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class SMLPPreTrainedModel(PreTrainedModel):
    config: SMLPConfig
    config_class = SMLPConfig
    auto_map = AUTO_MAP
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SMLPLayer"]  # noqa: RUF012 - transformers reads it as a class attribute
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = {"prices", "expert_bias"}  # noqa: RUF012 - as above

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw normal weights; projections to the residual are smaller by sqrt(2 layers).

        transformers calls it only for modules that have parameters or buffers of their own, and
        itself initializes the norms that it knows by name: torch's and its own.
        """
        super()._init_weights(module)
        std = self.config.initializer_range
        output_std = std / math.sqrt(2 * self.config.num_layers)
        if isinstance(module, SMLPSpatialProjection):
            init.uniform_(module.weight, -module.bound, module.bound)
            init.constant_(module.bias, module.start)
        elif isinstance(module, SMLPHeadNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, SMLPMinHashInput):
            init.zeros_(module.fingerprints)
        elif isinstance(module, nn.Linear) and hasattr(module, "std_divisor"):
            init.normal_(module.weight, std=std / module.std_divisor)
        elif isinstance(module, SMLPExperts):
            init.normal_(module.up_proj, std=std)
            init.normal_(module.down_proj, std=output_std)
        elif isinstance(module, SMLPSwitchRouter | SMLPTopKRouter):
            init.normal_(module.weight, std=std)
            if getattr(module, "has_bias", False):
                init.zeros_(module.expert_bias)
        elif isinstance(module, SMLPBaseRouter):
            init.orthogonal_(module.weight, gain=0.1)
            init.zeros_(module.prices)
        elif isinstance(module, SMLPHashRouter):
            init.copy_(module.table, module.random_table())
        elif isinstance(module, SMLPPartialPrediction) and hasattr(module, "prefix_router"):
            init.normal_(module.prefix_router, std=std)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """See transformers. The code is saved as well, under the names of both models."""
        self.config.auto_map = dict(self.auto_map)
        super().save_pretrained(*args, **kwargs)

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Module:
        """See transformers. HASH routes the new vocabulary, and all of it is generated except its
        padding: rows from `new_num_tokens` on that were padding before, or that are new."""
        config, before = self.config, self.config.vocab_size
        if config.input_projection == "minhash":
            raise ValueError(
                "the vocabulary of input_projection=minhash keeps its size: training makes the "
                "fingerprints of its tokenizer's strings, and new tokens would have none"
            )
        embeddings = super().resize_token_embeddings(
            new_num_tokens, pad_to_multiple_of, mean_resizing
        )
        padding = max(config.unpadded_vocab_size or before, new_num_tokens or 0)
        has_padding = padding < config.vocab_size
        config.unpadded_vocab_size = padding if has_padding else None
        if self.can_generate():
            self._suppress_padding()
        for module in self.modules() if config.vocab_size != before else ():
            if isinstance(module, SMLPHashRouter):
                module.resize(config.vocab_size)
        return embeddings

    def _suppress_padding(self) -> None:
        """Keep `generate` from drawing the vocabulary's padding."""
        size = self.config.vocab_size
        rows = list(range(self.config.unpadded_vocab_size or size, size))
        self.generation_config.suppress_tokens = rows or None


class SMLPModel(SMLPPreTrainedModel):
    """Embeddings, layers and final norm."""

    def __init__(self, config: SMLPConfig) -> None:
        super().__init__(config)
        self.reads_strings = config.input_projection == "minhash"
        if self.reads_strings:
            self.embed_tokens: nn.Module = SMLPMinHashInput(config)
        else:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.position_embedding_type == "learned_absolute":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(SMLPLayer(config, i) for i in range(config.num_layers))
        self.final_norm = _build_norm(config)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: SMLPCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        position_ids: Tensor | None = None,
        **others: Any,
    ) -> SMLPModelOutput:
        """See SMLPForCausalLM.forward."""
        self._warn_of_outputs(others)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        given: Any = input_ids if inputs_embeds is None else inputs_embeds
        if given.shape[1] == 1 and cache is None and use_cache is None and not self.training:
            logger.warning_once(
                "a single token without a cache stands at position 0: to go on token by token, "
                "give use_cache=True at first, and then the cache that the call before returned"
            )
        cache = self._cache(cache, use_cache)
        layout, move = self._layout(given, input_ids, attention_mask, cache, position_ids)
        hidden = self._embedded(inputs_embeds, layout, move, cache)
        if self.config.position_embedding_type == "learned_absolute":
            hidden = hidden + self.embed_positions(layout.positions).to(hidden.device)
        hidden = F.dropout(hidden, self.config.hidden_dropout, self.training)
        states, loss = [], None
        for layer in self.layers:
            if output_hidden_states:
                states.append(hidden)
            hidden, layer_loss = layer(hidden, layout, cache=cache)
            loss = _add(loss, layer_loss)
        states.append(self.final_norm(hidden))
        if move is not None:
            back = move.back[..., None]
            states = [state.take_along_dim(back.to(state.device), dim=1) for state in states]
        return SMLPModelOutput(
            last_hidden_state=states[-1],
            aux_loss=loss,
            cache=cache,
            hidden_states=tuple(states) if output_hidden_states else None,
        )

    def _warn_of_outputs(self, asked: dict[str, Any]) -> None:
        for name in ("output_attentions", "output_router_logits"):
            if asked.get(name, getattr(self.config, name, False)):
                logger.warning_once(
                    f"{name}=True is ignored: whatever its attn_implementation, the model returns "
                    "neither attention weights nor router logits"
                )

    def _embedded(
        self,
        inputs_embeds: Tensor | None,
        layout: Layout,
        move: "Move | None",
        cache: SMLPCache | None,
    ) -> Tensor:
        """Return <float>[B, T, D] of this call's tokens, by now padded on the right."""
        if inputs_embeds is None:
            if self.reads_strings:
                return self.embed_tokens(layout.input_ids, layout, cache)
            return self.embed_tokens(layout.input_ids)
        if self.reads_strings and cache is not None:
            raise ValueError(
                "inputs_embeds with a cache: input_projection=minhash reads the tokens before each "
                "one again; give input_ids"
            )
        if move is None:
            return inputs_embeds
        return inputs_embeds.take_along_dim(move.order[..., None].to(inputs_embeds.device), dim=1)

    def _cache(self, cache: SMLPCache | None, use_cache: bool | None) -> SMLPCache | None:
        # Recomputing a layer would write its states twice.
        recomputes = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if cache is not None and not isinstance(cache, SMLPCache):
            raise ValueError(
                f"cache is a {type(cache).__name__}, but this model keeps its states by absolute "
                "position: give an SMLPCache(config), or none"
            )
        if recomputes or not (use_cache or (use_cache is None and cache is not None)):
            if cache is not None and cache.num_columns:
                raise ValueError(
                    f"cache holds {cache.num_columns} tokens, which use_cache=False and gradient "
                    "checkpointing do not read: leave these out, or give all tokens and no cache"
                )
            return None
        return SMLPCache(self.config) if cache is None else cache

    def _layout(
        self,
        given: Tensor,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        cache: SMLPCache | None,
        position_ids: Tensor | None = None,
    ) -> tuple[Layout, "Move | None"]:
        """Return the positions of this call's tokens, and their move to right padding and back.

        given: [B, T] or [B, T, D]; attention_mask: [B, T of all calls], 0 on padding.
        """
        batch, num_columns = given.shape[:2]
        if attention_mask is not None and (
            attention_mask.dim() != 2 or attention_mask.shape[1] < num_columns
        ):
            raise ValueError(
                f"attention_mask has shape {list(attention_mask.shape)}: give [B, T], with a "
                f"column for each of {num_columns} tokens or of all so far"
            )
        first = 0 if cache is None else cache.num_columns
        lengths = None if cache is None else cache.lengths
        mask = None if attention_mask is None else attention_mask[:, -num_columns:].bool()
        if mask is not None and bool(mask.all()):
            mask = None
        move = None if mask is None else Move.to_the_right(mask)
        if move is not None and input_ids is not None:
            input_ids = input_ids.gather(1, move.order)
        width = num_columns if move is None else move.order.shape[1]
        columns = torch.arange(width, device=given.device)
        counts = columns.new_tensor([width]) if mask is None else mask.sum(dim=1)
        is_uniform = lengths is None and (mask is None or first == 0)
        before = columns.new_full((batch,), first) if lengths is None else lengths
        end = width + (first if lengths is None else int(lengths.max()))
        self._check_length(end)
        _check_positions(position_ids, before[:, None], mask)
        if cache is not None:
            is_ragged = lengths is not None or mask is not None
            cache.advance(num_columns, before + counts if is_ragged else None)
        return Layout(
            positions=before[:, None] + columns,
            start=first if is_uniform else None,
            valid=None if mask is None else columns < counts[:, None],
            input_ids=input_ids,
            end=end,
            cached=cache is not None,
        ), move

    def _check_length(self, length: int) -> None:
        longest = self.config.max_position_embeddings
        if length > longest and not self.config.reads_any_length:
            raise ValueError(
                f"a sequence of {length} tokens is longer than max_position_embeddings={longest}: "
                f"the model has no weights for positions from {longest} on; cut it from the left"
            )


def _check_positions(position_ids: Tensor | None, before: Tensor, mask: Tensor | None) -> None:
    """Refuse positions other than the tokens' own, such as of documents packed into a row.

    position_ids: <int64>[B or 1, T]; before: <int64>[B, 1], tokens so far; mask: <bool>[B, T].
    """
    if position_ids is None:
        return
    given = position_ids.expand(len(before), -1)
    real = torch.ones_like(given, dtype=torch.bool) if mask is None else mask
    if not torch.equal(given[real], (before + real.cumsum(dim=1) - 1)[real]):
        raise ValueError(
            "position_ids are not 0, 1, 2, ... of the tokens: matrices over positions cannot start "
            "again within a row, so packed documents would mix; give each a row of its own"
        )


class SMLPForCausalLM(SMLPPreTrainedModel, GenerationMixin):
    """The language model: logits are states times lm_head, by default the token embedding."""

    accepts_loss_kwargs = False
    """Trainer would pass the number of all labels; partial prediction does not train on all."""
    _tied_weights_keys = {  # noqa: RUF012 - transformers reads it as a class attribute
        "lm_head.weight": "model.embed_tokens.weight"
    }
    body = SMLPModel

    def __init__(self, config: SMLPConfig) -> None:
        super().__init__(config)
        self.model = self.body(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._suppress_padding()
        self.post_init()

    @can_return_tuple
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: SMLPCache | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Run a forward pass over a batch, or over only its new tokens if a cache is given.

        Args:
            input_ids: <int64>[B, T].
            attention_mask: <int64 or bool>[B, tokens so far], 0 on padding, which may be on either
                side. Positions count real tokens only.
            inputs_embeds: <float>[B, T, D] instead of input_ids.
            cache: what an earlier call returned.
            use_cache: whether to fill a cache; default: if one is given. `generate` follows
                generation_config.use_cache. Capacity limits drop nothing while one is filled, since
                a token by itself would not be dropped either.
            labels: <int64>[B, T], shifted inside; -100 is ignored.
            logits_to_keep: compute the logits of only this many last positions (0: all), or of the
                columns in <int64>[K] or [B, K]; those marked in <bool>[B, T] become one dimension.
            position_ids: <int64>[B or 1, T], which must be the tokens' 0, 1, 2, ...

        Returns:
            loss (with labels; in training with the routers' losses), aux_loss (the routers' losses,
            training only), logits <fp32>[B, T, V], cache, hidden_states. Attention weights and
            router logits are not returned; asking for them logs a warning.

        Raises:
            ValueError: a sequence longer than T (unless the model reads any length), a cache of
                another kind or with tokens that would not be read, no token ids for HASH, documents
                that are packed into a row.
        """
        outputs = self.model(
            *(input_ids, attention_mask, inputs_embeds, cache, use_cache, output_hidden_states),
            position_ids=position_ids,
            return_dict=True,
            **kwargs,
        )
        kept = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        logits = project(self.lm_head, kept)
        # As Megatron's: what they are used for, log-probabilities first, must not round to 8 bits.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        aux_loss = outputs.aux_loss
        loss = None
        if labels is not None:
            targets = self._targets(labels, attention_mask)
            loss = self.loss_function(logits, targets, vocab_size=self.config.vocab_size, **kwargs)
            loss = _add(loss, aux_loss)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
        )

    def _targets(self, labels: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Mask each sample's first token, which no token precedes: padding on the left predicts
        nothing. Partial prediction trains only its routed rows, t >= P, unless told otherwise.

        Label t is predicted by row t - 1: the first that counts is label P + 1. A sample without
        labels there, such as one that ends before P, has no routed row and keeps all its labels.
        """
        mask = torch.ones_like(labels) if attention_mask is None else attention_mask
        positions = (mask.long().cumsum(dim=1) - 1)[:, -labels.shape[1] :]
        labels = labels.masked_fill(positions <= 0, -100)
        config = self.config
        is_partial = config.routes_by_prefix and config.partial_loss == "suffix"
        if not (self.training and is_partial):
            return labels
        routed = labels.masked_fill(positions <= config.prefix_length, -100)
        return torch.where((routed != -100).any(dim=1, keepdim=True), routed, labels)

    def _prepare_position_ids_for_generation(self, *args: Any, **kwargs: Any) -> None:
        """Give `generate` none: the mask and the cache determine the positions."""

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Give `generate`, which calls this, our own kind of cache, whichever it would choose."""
        self._end_at_longest(generation_config, model_kwargs)
        if model_kwargs.get("cache") is None and generation_config.use_cache is not False:
            model_kwargs["cache"] = SMLPCache(self.config)
        else:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    def _prepare_generated_length(self, generation_config: Any, **kwargs: Any) -> Any:
        """Note how many of the tokens that `generate` counts are the prompt's: none for embeddings,
        and perhaps only the new ones for a prompt that continues with a cache.

        A default length is not cut at T here: for some models T is no limit, and for the others
        `_end_at_longest` knows which columns are padding.
        """
        default = generation_config.max_length
        generation_config = super()._prepare_generated_length(generation_config, **kwargs)
        if kwargs["has_default_max_length"] and generation_config.max_new_tokens is None:
            generation_config.max_length = default + kwargs["input_ids_length"]
        generation_config._counted_of_prompt = kwargs["input_ids_length"]
        return generation_config

    def _end_at_longest(self, generation_config: Any, model_kwargs: dict[str, Any]) -> None:
        """Make `generate` end at position T and say so, instead of failing there."""
        if self.config.reads_any_length:
            return
        mask = model_kwargs.get("attention_mask")
        # transformers drops a mask without padding, and keeps its length.
        prompt = generation_config._mask_length if mask is None else int(mask.sum(dim=1).max())
        longest = self.config.max_position_embeddings
        if prompt >= longest:
            raise ValueError(
                f"a prompt of {prompt} tokens leaves no position to generate at: the model ends at "
                f"max_position_embeddings={longest}; cut the prompt from the left"
            )
        uncounted = prompt - generation_config._counted_of_prompt
        asked = generation_config.max_length + uncounted
        if asked > longest:
            logger.warning(
                f"generation stops at position {longest} (max_position_embeddings) instead of "
                f"{asked}: the model has no weights for later positions"
            )
            generation_config.max_length = longest - uncounted


# `save_pretrained` puts this file and its configuration's next to the weights.
SMLPModel.register_for_auto_class("AutoModel")
SMLPForCausalLM.register_for_auto_class("AutoModelForCausalLM")
# From the name here Trainer knows, for label smoothing, that targets are the next tokens.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(SMLPConfig.model_type, SMLPForCausalLM.__name__)

__all__ = ["SMLPCache", "SMLPConfig", "SMLPForCausalLM", "SMLPModel", "SMLPPreTrainedModel"]
