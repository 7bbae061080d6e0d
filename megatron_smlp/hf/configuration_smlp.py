"""Configuration of the sparse all-MLP language models and their baselines, for transformers.

Names are Megatron's where Megatron has one. `num_hidden_layers` and `seq_length` are accepted as
aliases of `num_layers` and `max_position_embeddings`.
"""

from fractions import Fraction
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils.versions import require_version

require_version("transformers>=5.24", "for this model: pip install -U transformers")

_ALLOWED = {
    "architecture": ("transformer", "gmlp", "amlp", "smlp", "mixer"),
    "input_projection": ("embedding", "minhash"),
    "token_router": ("none", "switch", "gshard", "base", "hash", "topk"),
    "feature_router": ("none", "deterministic", "partial"),
    "hidden_act": ("gelu", "gelu_new"),
    "moe_drop_policy": ("position", "probs"),
    "base_routing_input": ("residual", "norm"),
    "base_gate": ("score", "price"),
    "base_eval": ("greedy", "prices"),
    "gshard_second_expert": ("paper", "all", "raw"),
    "partial_loss": ("suffix", "all"),
    "normalization": ("LayerNorm", "RMSNorm"),
    "position_embedding_type": ("learned_absolute", "rope", "none"),
    "moe_router_score_function": ("softmax", "sigmoid"),
}
_ATTENTION = ("transformer",)
_GATING = ("gmlp", "amlp", "smlp")
_TOEPLITZ = (*_GATING, "mixer")
_FEED_FORWARD = ("transformer", "mixer")
"""Architectures by what they have: attention and learned positions, spatial gating, matrices that
may be Toeplitz, an FFN next to the mixer."""

_MIXER_OF = {"transformer": "attention", "gmlp": "spatial_gating", "mixer": "masked_mixer"}
"""By architecture, its mixer's name in the layers of a plugin's architecture."""

_TOP_K = ("token_router", ("topk",))
# A field that applies only to some values of another one.
_IS_FOR = {
    "toeplitz": ("architecture", _TOEPLITZ),
    "mixer_expansion": ("architecture", ("mixer",)),
    **dict.fromkeys(("num_query_groups", "qk_layernorm"), ("architecture", _ATTENTION)),
    **dict.fromkeys(("feature_router", "num_dense_layers"), ("architecture", ("smlp",))),
    **dict.fromkeys(("moe_router_enable_expert_bias", "moe_router_topk_scaling_factor"), _TOP_K),
    **dict.fromkeys(("moe_router_num_groups", "moe_router_group_topk"), _TOP_K),
}


@strict
class SMLPConfig(PreTrainedConfig):
    """Configuration of a model; all sizes are in elements.

    Args:
        architecture: transformer, gmlp, amlp (gmlp and one small attention head), smlp, mixer
            (masked mixer), or a plugin's.
        plugin: hashes of the files whose mixers and routers it uses, their options, and layers.
        token_router: how tokens choose FFN experts: none, switch, gshard, base, hash or topk.
        feature_router: smlp only: how chunks of features choose spatial experts.
        ffn_hidden_size: Z; the FFN's width, or twice the gate width F of a spatial gating block.
        num_layers, num_dense_layers: smlp: the first `num_dense_layers` are dense (N1), the others
            sparse (N2).
        max_position_embeddings: T, tokens: the size of every spatial matrix and the longest input.
        spatial_heads: heads of a dense spatial gating block, or of a masked mixer.
        toeplitz: whether spatial matrices hold one weight per distance, M[t, s] = m[t - s], and one
            bias; without learned positions an input may then be longer than T, and every token sees
            the last T.
        mixer_expansion: mixer: whether there are two matrices with a GELU between them.
        input_projection: what maps tokens to vectors: a table (embedding), or counted hashes of
            their strings (minhash), with an output layer that is never tied.
        hash_count, filter_size: minhash: values of a token's fingerprint, and the counters into
            which they fall.
        window: minhash: tokens before each one that are counted with it.
        num_feature_experts: spatial experts of a sparse block.
        num_feature_chunks: chunks of its features; default: one per expert.
        prefix_fraction: partial prediction routes from the first floor(prefix_fraction * T) tokens.
        partial_loss: partial prediction trains on targets after that prefix (suffix), or on all.
        feature_aux_loss_coeff: weight of the balance loss over spatial experts.
        unpadded_vocab_size: number of the tokenizer's ids; rows from there on are padding.
        num_experts, moe_ffn_hidden_size: FFN experts of a token MoE and their width (default:
            ffn_hidden_size); experts have no bias.
        moe_layer_freq: every n-th layer from the first has a token MoE, or one 0/1 per layer
            (all but smlp, in which every sparse layer has one).
        moe_train_capacity_factor, moe_eval_capacity_factor: switch and gshard: slots of an expert,
            as a multiple of an even share; None drops nothing.
        moe_drop_policy: which choices a full expert drops: later positions, or smaller router
            probabilities.
        moe_aux_loss_coeff: weight of the balance loss of switch, gshard and topk.
        moe_z_loss_coeff: weight of the mean of (log sum_e exp h w_e)^2 over the tokens, for every
            router but hash; None: there is no such loss.
        base_routing_input: base: whether scores and weights are of the residual stream or its norm.
        base_gate: base: an expert's weight is the sigmoid of its score, or (price) of its lead over
            the mean of the experts at their prices, by which evaluation then chooses too.
        base_eval: base: in evaluation a token goes to the expert of its highest score (greedy), or
            of its highest score minus the expert's price (prices).
        gshard_second_expert: gshard: in training the second expert is used with probability
            2 g2 / (g1 + g2) (paper), always (all), or with 2 g2 (raw).
        hash_seed: seed of the random hash table of a new model.
        tiny_attention_width: width of amlp's attention head.
        add_bias_linear: whether projections (not experts, not routers) have a bias.
        hidden_act: gelu (exact) or gelu_new (tanh approximation).
        swiglu: whether FFNs and experts are SwiGLU: silu(a) b of two projections.
        normalization: LayerNorm or RMSNorm, for all norms but a gate's, which is LayerNorm.
        qk_layernorm: transformer: whether the queries and keys of each head have a norm of that
            kind, before they are rotated.
        position_embedding_type: transformer: learned_absolute (the default), rope or none; amlp:
            none (the default) or rope, for its attention head; our others have none.
        rotary_base: rope: base of the wavelengths.
        num_query_groups: transformer: heads of keys and values, each shared by equally many query
            heads; default: one per head.
        moe_router_topk: topk, or a plugin's that leaves it open: experts per token.
        moe_router_num_groups, moe_router_group_topk: topk: experts are chosen from this many
            of the groups, those with the largest sums of best scores; None: from all.
        moe_router_score_function: topk: softmax over the experts, or sigmoid of each.
        moe_router_enable_expert_bias: topk: whether a bias per expert, moved by its load and not by
            gradients, is added to the scores only for the choice (sigmoid only).
        moe_router_bias_update_rate: topk: how far a training step in Megatron moves that bias;
            here it stays as it is.
        moe_router_topk_scaling_factor: topk: factor of the weights, whose sum is 1.
        moe_shared_expert_intermediate_size: width of a shared FFN, which every token visits
            besides its experts; None: there is none.

    Raises:
        StrictDataclassError: a value has the wrong type for its field.
        ValueError: a value is not possible; the message says what is allowed.
    """

    model_type = "smlp"
    keys_to_ignore_at_inference = ["cache"]  # noqa: RUF012 - Trainer adds a list to it
    attribute_map = {  # noqa: RUF012 - transformers reads it as a plain class attribute
        "num_hidden_layers": "num_layers",
        "seq_length": "max_position_embeddings",
    }

    architecture: str = "smlp"
    token_router: str = "none"
    feature_router: str = "none"
    vocab_size: int = 50304
    unpadded_vocab_size: int | None = None
    hidden_size: int = 768
    ffn_hidden_size: int = 3072
    num_layers: int = 12
    num_dense_layers: int = 0
    num_attention_heads: int = 12
    max_position_embeddings: int = 1024
    spatial_heads: int = 1
    toeplitz: bool = False
    mixer_expansion: bool = False
    input_projection: str = "embedding"
    hash_count: int = 64
    filter_size: int = 1024
    window: int = 1
    num_feature_experts: int = 1
    num_feature_chunks: int | None = None
    prefix_fraction: float | int = 0.2
    partial_loss: str = "suffix"
    feature_aux_loss_coeff: float | int = 0.01
    num_experts: int | None = None
    moe_ffn_hidden_size: int | None = None
    moe_layer_freq: int | list[int] = 1
    moe_train_capacity_factor: float | int | None = None
    moe_eval_capacity_factor: float | int | None = None
    moe_drop_policy: str = "position"
    moe_aux_loss_coeff: float | int = 0.01
    moe_z_loss_coeff: float | int | None = None
    base_routing_input: str = "residual"
    base_gate: str = "score"
    base_eval: str = "greedy"
    gshard_second_expert: str = "paper"
    hash_seed: int = 0
    tiny_attention_width: int = 64
    add_bias_linear: bool = True
    hidden_act: str = "gelu"
    swiglu: bool = False
    normalization: str = "LayerNorm"
    qk_layernorm: bool = False
    position_embedding_type: str | None = None
    rotary_base: int = 10000
    num_query_groups: int | None = None
    moe_router_topk: int | None = None
    moe_router_num_groups: int | None = None
    moe_router_group_topk: int | None = None
    moe_router_score_function: str = "softmax"
    moe_router_enable_expert_bias: bool = False
    moe_router_bias_update_rate: float | int = 1e-3
    moe_router_topk_scaling_factor: float | int | None = None
    moe_shared_expert_intermediate_size: int | None = None
    plugin: dict[str, Any] | None = None
    hidden_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    layer_norm_epsilon: float | int = 1e-5
    initializer_range: float | int = 0.02
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.position_embedding_type is None:
            self.position_embedding_type = self._positions
        if self.token_router == "topk" and self.moe_router_topk is None:
            self.moe_router_topk = 2
        if self.input_projection == "minhash":
            self.tie_word_embeddings = False  # there is no table that the output layer could share
        self._check_choices()
        self._check_widths()
        if self.token_router != "none":
            fewest = 2 if self.token_router == "gshard" else 1
            what = f"be {fewest} or more with token_router={self.token_router}"
            self._require("num_experts", (self.num_experts or 0) >= fewest, what)
        self._check_features()

    @property
    def gate_width(self) -> int:
        """F, the width of each half of a spatial gating block."""
        return self.ffn_hidden_size // 2

    @property
    def prefix_length(self) -> int:
        """P, the tokens that partial prediction routes from; 0.29 of 100 are 29, not 28."""
        return int(Fraction(str(self.prefix_fraction)) * self.max_position_embeddings)

    @property
    def routes_by_prefix(self) -> bool:
        """Whether a sample's chunks choose their experts by its first tokens."""
        return self.feature_router not in ("none", "deterministic")

    @property
    def num_chunks(self) -> int:
        """C, the chunks of features of a sparse block."""
        return self.num_feature_chunks or self.num_feature_experts

    @property
    def expert_width(self) -> int:
        """X, the width of one FFN expert."""
        return self.moe_ffn_hidden_size or self.ffn_hidden_size

    def slots(self, index: int) -> tuple[str, str]:
        """Return the names of what fills the slots of layer `index`, token experts aside."""
        if self._plugged:
            mixer, channel = self._plugged[index]
            return mixer, channel
        mixer = _MIXER_OF.get(self.architecture, "spatial_gating")
        return mixer, "mlp" if self.architecture in _FEED_FORWARD else "none"

    @property
    def _plugged(self) -> list[tuple[str, str]]:
        return (self.plugin or {}).get("layers") or []

    @property
    def _attends(self) -> bool:
        return self._is("architecture", _ATTENTION)

    def _is(self, field: str, values: tuple[str, ...]) -> bool:
        """Return whether a field has one of these values, or some layer of a plugin's architecture
        the mixer of one of these architectures."""
        if field == "architecture" and self._plugged:
            mixers = {mixer for mixer, _ in self._plugged}
            return any(_MIXER_OF.get(name) in mixers for name in values)
        return getattr(self, field) in values

    @property
    def _positions(self) -> str:
        """The position_embedding_type of the architecture, where none is given."""
        if self._plugged:
            return self.position_embedding_type or "learned_absolute"
        return "learned_absolute" if self.architecture in _ATTENTION else "none"

    @property
    def turning_base(self) -> int | None:
        """Return the base of RoPE; None: queries and keys are not rotated."""
        return self.rotary_base if self.position_embedding_type == "rope" else None

    @property
    def reads_any_length(self) -> bool:
        """Whether an input may exceed T tokens, where learned positions and plugins' mixers end."""
        is_ours = all(mixer in _MIXER_OF.values() for mixer, _ in self._plugged)
        return self.toeplitz and is_ours and self.position_embedding_type != "learned_absolute"

    @property
    def states_per_layer(self) -> int:
        """Return how many states the mixer of each layer keeps for generation."""
        return 2 if self.architecture == "amlp" or self.mixer_expansion else 1

    def is_sparse_layer(self, index: int) -> bool:
        """Return whether layer `index` belongs to the N2 sparse ones of smlp."""
        return self.architecture == "smlp" and index >= self.num_dense_layers

    def has_token_moe(self, index: int) -> bool:
        """Return whether the channel slot of layer `index` is a token MoE."""
        if self.token_router == "none":
            return False
        if self.architecture == "smlp":
            return self.is_sparse_layer(index)
        if isinstance(self.moe_layer_freq, int):
            return index % self.moe_layer_freq == 0
        return bool(self.moe_layer_freq[index])

    def _require(self, name: str, is_possible: bool, what: str) -> None:
        if not is_possible:
            raise ValueError(f"{name}={getattr(self, name)}: must {what}")

    def _check_choices(self) -> None:
        plugged = ("architecture", "token_router", "feature_router") if self.plugin else ()
        for name, allowed in _ALLOWED.items():
            what = f"be one of {', '.join(allowed)}"
            self._require(name, getattr(self, name) in allowed or name in plugged, what)
        if self.token_router in _ALLOWED["token_router"] and self.token_router != "topk":
            what = f"be None with token_router={self.token_router}, whose number is fixed"
            self._require("moe_router_topk", self.moe_router_topk is None, what)
        for name, (field, values) in _IS_FOR.items():
            value = getattr(self, name)
            if value and value != "none" and not self._is(field, values):
                kinds, given = " or ".join(values), getattr(self, field)
                raise ValueError(f"{name}={value} is for {field}={kinds}, not {given}")

    def _check_widths(self) -> None:
        if self._attends:
            self._check_divides("num_attention_heads", self.hidden_size, "hidden_size = ")
        else:
            allowed = [self._positions, *(["rope"] if self.architecture == "amlp" else [])]
            what = f"be {' or '.join(allowed)} with architecture={self.architecture}"
            is_possible = self.position_embedding_type in allowed
            self._require("position_embedding_type", is_possible, what)
        if self.architecture == "mixer":
            self._check_divides("spatial_heads", self.hidden_size, "hidden_size = ")
        if self.architecture in _GATING:
            for name in ("spatial_heads", "num_chunks"):
                width = self.ffn_hidden_size / 2
                self._check_divides(name, width, "the gate width, ffn_hidden_size / 2 = ")

    def _check_divides(self, name: str, width: float, what: str) -> None:
        divisor = getattr(self, name)
        self._require(name, divisor > 0 and width % divisor == 0, f"divide {what}{width:g}")

    def _check_features(self) -> None:
        if self.architecture != "smlp":
            return
        is_possible = 0 <= self.num_dense_layers <= self.num_layers
        what = f"lie between 0 and num_layers={self.num_layers}"
        self._require("num_dense_layers", is_possible, what)
        if self.feature_router == "deterministic":
            is_possible = self.num_chunks == self.num_feature_experts
            what = f"equal num_feature_experts={self.num_feature_experts}: chunk i goes to expert i"
            self._require("num_feature_chunks", is_possible, what)
        if self.routes_by_prefix:
            self._require(
                "prefix_fraction",
                0 < self.prefix_fraction < 1 and self.prefix_length > 0,
                "lie between 0 and 1 and leave at least one of max_position_embeddings="
                f"{self.max_position_embeddings} tokens",
            )


SMLPConfig.register_for_auto_class()

__all__ = ["SMLPConfig"]
