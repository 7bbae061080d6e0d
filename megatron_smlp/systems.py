"""The tables of what a model can be made of: token routers, token mixers, architectures.

Each router, mixer or architecture has one entry here; flags, layers, accounting and messages look
it up. This module does not import torch: `module:name` strings defer heavy imports until use.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal


def load(reference: str) -> Any:
    """Import and return the object that `module:name` names."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


@dataclass(frozen=True, kw_only=True)
class TokenRouterRule:
    """A rule by which tokens choose among FFN experts."""

    module: str
    """Its class, as `module:name`; megatron_smlp/routers/ has one file per rule."""
    experts_per_token: int = 1
    takes_topk: bool = False
    """Whether --moe-router-topk sets how many experts a token visits; `experts_per_token` is then
    the default."""
    has_balance_loss: bool = False
    has_capacity: bool = False
    """Whether experts have a capacity limit: --moe-train-capacity-factor."""
    has_weights: bool = True
    """Whether it scores tokens with a weight matrix; if not, no load counts as a collapse."""
    reads_ids: bool = False
    """Whether it needs the token ids, which every pipeline stage then reads."""
    plugin: Any = None
    """The plugin class (megatron_smlp/plugins.py) that the router hosts, if any."""
    upcycling_scale: Callable[[int], float] | None = None
    """Number of experts -> 1 / the sum of a token's weights when all scores are equal, the factor
    by which copies of a dense FFN must be scaled up. None: a model cannot be upcycled to it."""


TOKEN_ROUTERS: dict[str, TokenRouterRule] = {
    "switch": TokenRouterRule(
        module="megatron_smlp.routers.switch:SwitchRouter",
        has_balance_loss=True,
        has_capacity=True,
        upcycling_scale=float,
    ),
    "gshard": TokenRouterRule(
        module="megatron_smlp.routers.gshard:GShardRouter",
        experts_per_token=2,
        has_balance_loss=True,
        has_capacity=True,
        upcycling_scale=lambda _: 1.0,
    ),
    "base": TokenRouterRule(
        module="megatron_smlp.routers.base:BaseRouter", upcycling_scale=lambda _: 2.0
    ),
    "hash": TokenRouterRule(
        module="megatron_smlp.routers.hash:HashRouter",
        has_weights=False,
        reads_ids=True,
        upcycling_scale=lambda _: 1.0,
    ),
    "topk": TokenRouterRule(
        module="megatron_smlp.routers.topk:TopKTokenRouter",
        experts_per_token=2,
        takes_topk=True,
        has_balance_loss=True,
    ),
}
LIMITED = [name for name, rule in TOKEN_ROUTERS.items() if rule.has_capacity]
WITH_BALANCE_LOSS = [name for name, rule in TOKEN_ROUTERS.items() if rule.has_balance_loss]
SCORING = [name for name, rule in TOKEN_ROUTERS.items() if rule.has_weights]
READING_IDS = [name for name, rule in TOKEN_ROUTERS.items() if rule.reads_ids]
TOP_K = [name for name, rule in TOKEN_ROUTERS.items() if rule.takes_topk]


@dataclass(frozen=True, kw_only=True)
class FeatureRouterRule:
    """A rule by which chunks of the hidden dimension choose among spatial experts."""

    module: str | None = None
    """The router's class, as `module:name`; None: no router, chunk i goes to expert i."""
    plugin: Any = None
    """The plugin class (megatron_smlp/plugins.py) that the router hosts, if any."""


FEATURE_ROUTERS: dict[str, FeatureRouterRule] = {
    "deterministic": FeatureRouterRule(),
    "partial": FeatureRouterRule(module="megatron_smlp.routers.prefix:PrefixRouter"),
}
BY_PREFIX = [name for name, rule in FEATURE_ROUTERS.items() if rule.module]
"""Feature routers that route a sample by its first tokens."""


def feature_router_class(name: str) -> Any:
    """Import and return a rule's router class; None if it has none."""
    rule = FEATURE_ROUTERS.get(name, FeatureRouterRule())
    router: Any = load(rule.module) if rule.module else None
    return router(rule.plugin) if rule.plugin else router


def experts_of_a_token(name: str, topk: int) -> int:
    """Return a rule's k; `topk`, --moe-router-topk, is that of rules that take it or of no rule."""
    rule = TOKEN_ROUTERS.get(name)
    return topk if rule is None or rule.takes_topk else rule.experts_per_token


def weighs_all_experts(name: str, topk: int) -> bool:
    """Return Megatron's --moe-router-pre-softmax: whether the softmax precedes the choice.

    Megatron requires it if a token visits one expert; our own rules ignore it.
    """
    return name not in TOP_K or topk == 1


def token_router_class(name: str) -> Any:
    """Import and return a rule's router class."""
    rule = TOKEN_ROUTERS[name]
    return load(rule.module)(rule.plugin) if rule.plugin else load(rule.module)


@dataclass(frozen=True, kw_only=True)
class MixerEntry:
    """A token mixer that can fill a layer's first slot."""

    spec: str
    """The function that makes its Megatron spec, as `module:name`."""
    cost: str
    """The function that counts its parameters and FLOPs, as `module:name`."""
    title: str
    """Its name in the layer table; {heads} and flag names in braces stand for their values."""
    heads: str = "spatial_heads"
    """The flag that sets how many heads, or spatial experts, a layer has."""
    attends: bool = False
    """Whether it has attention heads with queries and keys: --num-attention-heads."""
    rotates: bool = False
    """Whether it has queries and keys that --position-embedding-type rope rotates."""
    drops_attention: bool = False
    """Whether --attention-dropout applies to it."""
    learned_positions: bool = False
    """Whether the input has learned positions by default; other mixers have rows by position."""
    spatial: bool = False
    """Whether it has spatial matrices: --spatial-heads, --toeplitz."""
    routes: bool = False
    """Whether a router sends its chunks to experts."""
    recomputes: bool = False
    """Whether --recompute-granularity selective recomputes part of it."""
    for_plugins: bool = True
    """Whether a plugin's architecture may use it; if not, only amlp or smlp does."""
    check: str | None = None
    """The function that raises ValueError for flags it cannot be built with, as `module:name`."""
    plugin: Any = None
    """The plugin class (megatron_smlp/plugins.py), if any, passed to spec, cost and check."""


CHANNELS: dict[str, Any] = {}
"""Channel mixer classes of plugins, by name."""
COSTS = "megatron_smlp.accounting.mixers"
GATING_CHECK = "megatron_smlp.layers.spatial_gating:check_flags"
MIXERS: dict[str, MixerEntry] = {
    "attention": MixerEntry(
        spec="megatron_smlp.layers.attention:attention_spec",
        cost=f"{COSTS}:attention_cost",
        title="self-attention, heads: {heads}",
        heads="num_attention_heads",
        attends=True,
        rotates=True,
        drops_attention=True,
        learned_positions=True,
        recomputes=True,
    ),
    "spatial_gating": MixerEntry(
        spec="megatron_smlp.layers.spatial_gating:gating_spec",
        cost=f"{COSTS}:gating_cost",
        title="spatial gating, heads: {heads}",
        spatial=True,
        recomputes=True,
        check=GATING_CHECK,
    ),
    "gating_and_attention": MixerEntry(
        spec="megatron_smlp.layers.tiny_attention:gating_and_attention_spec",
        cost=f"{COSTS}:gating_and_attention_cost",
        title="spatial gating, heads: {heads}, and attention of width {tiny_attention_width}",
        rotates=True,
        drops_attention=True,
        spatial=True,
        recomputes=True,
        for_plugins=False,
        check="megatron_smlp.layers.tiny_attention:check_flags",
    ),
    "feature_moe": MixerEntry(
        spec="megatron_smlp.layers.feature_moe:feature_moe_spec",
        cost=f"{COSTS}:feature_moe_cost",
        title="feature MoE ({feature_router}), experts: {heads}",
        heads="num_feature_experts",
        spatial=True,
        routes=True,
        recomputes=True,
        for_plugins=False,
        check=GATING_CHECK,
    ),
    "masked_mixer": MixerEntry(
        spec="megatron_smlp.layers.masked_mixer:masked_mixer_spec",
        cost=f"{COSTS}:masked_mixer_cost",
        title="masked mixer, heads: {heads}",
        spatial=True,
        check="megatron_smlp.layers.masked_mixer:check_flags",
    ),
}


@dataclass(frozen=True, kw_only=True)
class ArchitectureEntry:
    """The mixers of a model's layers."""

    mixer: str
    channel: str = "none"
    """The channel mixer of layers without token experts: mlp, none or a plugin's."""
    sparse_mixer: str | None = None
    """smlp: the token mixer of the sparse layers if --feature-router is given."""
    layers: Callable[[int, int], tuple[str, str]] | None = None
    """Plugins only: (layer number from 0, number of layers) -> mixer and channel of that layer."""
    others: tuple[str, ...] = ()
    """Mixers of its layers other than `mixer`."""

    @property
    def mixers(self) -> list[MixerEntry]:
        return [MIXERS[name] for name in (self.mixer, *self.others)]

    @property
    def attends(self) -> bool:
        return any(mixer.attends for mixer in self.mixers)

    @property
    def rotates(self) -> bool:
        return any(mixer.rotates for mixer in self.mixers)

    @property
    def positions(self) -> Literal["learned_absolute", "none"]:
        """The default of --position-embedding-type, and the value that can be exported."""
        learned = any(mixer.learned_positions for mixer in self.mixers)
        return "learned_absolute" if learned else "none"


ARCHITECTURES: dict[str, ArchitectureEntry] = {
    "transformer": ArchitectureEntry(mixer="attention", channel="mlp"),
    "gmlp": ArchitectureEntry(mixer="spatial_gating"),
    "amlp": ArchitectureEntry(mixer="gating_and_attention"),
    "smlp": ArchitectureEntry(mixer="spatial_gating", sparse_mixer="feature_moe"),
    "mixer": ArchitectureEntry(mixer="masked_mixer", channel="mlp"),
}
SPECS = [["megatron_smlp.architectures", name] for name in ARCHITECTURES]
"""The allowed values of --spec, in the order of the architectures."""
POSITIONS = ("learned_absolute", "rope", "none")
"""--position-embedding-type of models that attend."""
SPATIAL = tuple(name for name, kind in ARCHITECTURES.items() if MIXERS[kind.mixer].spatial)


@dataclass(frozen=True)
class LayerSlots:
    """What fills the two slots of one layer."""

    mixer: str
    """One of MIXERS."""
    channel: str
    """mlp, token_moe, none or one of CHANNELS."""
    heads: int
    """Attention heads, spatial heads or spatial experts, whichever the mixer has."""

    @property
    def routes(self) -> bool:
        """Return whether one of the slots sends tokens or chunks to experts."""
        return self.channel == "token_moe" or MIXERS[self.mixer].routes


def is_moe_layer(index: int, moe_layer_freq: int | list[int]) -> bool:
    """Apply Megatron's rule: every freq-th layer from the first, or a pattern of zeros and ones."""
    if isinstance(moe_layer_freq, list):
        return bool(moe_layer_freq[index])
    return index % moe_layer_freq == 0


def layer_slots(options: Any, sizes: Any, *, num_experts: int | None) -> list[LayerSlots]:
    """Return the slots of every layer, first to last.

    | architecture | mixer | channel |
    |---|---|---|
    | transformer | attention | mlp; token MoE in MoE layers |
    | gmlp | spatial gating | none (it is inside the block); token MoE in MoE layers |
    | amlp | spatial gating and a small attention head | the same |
    | smlp, first N1 | spatial gating | none |
    | smlp, then N2 | feature MoE | token MoE if --num-experts is given |
    | mixer | masked mixer | mlp; token MoE in MoE layers |

    Args:
        options: ModelOptions, or anything with its attributes.
        sizes: Megatron's namespace or config, which differ in their name for `num_experts`.
    """
    kind = ARCHITECTURES[options.architecture]
    slots = []
    for index in range(sizes.num_layers):
        mixer, channel = kind.mixer, kind.channel
        if kind.layers:
            mixer, channel = kind.layers(index, sizes.num_layers)
        is_sparse = index >= options.num_dense_layers
        if kind.sparse_mixer and is_sparse and options.feature_router != "none":
            mixer = kind.sparse_mixer
        routes = num_experts is not None and (
            is_sparse if kind.sparse_mixer else is_moe_layer(index, sizes.moe_layer_freq)
        )
        heads = MIXERS[mixer].heads
        count = getattr(sizes if heads == "num_attention_heads" else options, heads)
        slots.append(
            LayerSlots(
                mixer=mixer,
                channel="token_moe" if routes else channel,
                heads=1 if count is None else count,  # None: nothing attends
            )
        )
    return slots
