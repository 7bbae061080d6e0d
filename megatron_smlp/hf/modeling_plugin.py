"""Models with mixers and routers of plugins (plugins.py), for transformers.

A plugin's own class, the one that was trained, stands between plain linear layers:

    out = mixer(x W_1, x W_2, ...) W                  x = LN(input);  W_i: D x m_i F,  W: F x D

Generation caches the projections' outputs, and mixes all tokens again at each step; or it caches
the state of a class that has one.
In an exported folder the last lines import the plugins' files, which register themselves.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.generic import maybe_autocast

from megatron_smlp.hf.configuration_smlp import SMLPConfig
from megatron_smlp.hf.modeling_smlp import (
    HOSTED,
    Layout,
    Routing,
    SMLPCache,
    SMLPCacheLayer,
    SMLPForCausalLM,
    SMLPModel,
    SMLPPartialPrediction,
    SMLPPreTrainedModel,
    project,
    rows_of_call,
    so_far,
    to_residual,
)
from megatron_smlp.plugins import (
    Mixer,
    Weight,
    compute_tables,
    keeps_state,
    mix,
    options_of,
    projections_of,
    register,
)


def _values(config: SMLPConfig, kind: type) -> dict[str, Any]:
    """Return the values of a class's options."""
    given = (config.plugin or {})["options"]
    return {name: given.get(name, it.default) for name, it in options_of(kind).items()}


class SMLPHostedMixer(nn.Module):
    """See the top of the file.

    Args:
        state: index of a token mixer's layer in the cache; a channel mixer, None, keeps nothing.
    """

    def __init__(self, config: SMLPConfig, kind: type[Mixer], state: int | None) -> None:
        super().__init__()
        values, bias = _values(config, kind), config.add_bias_linear
        features = kind.features(
            hidden_size=config.hidden_size, ffn_hidden_size=config.ffn_hidden_size, values=values
        )
        self.state, self.keeps_state = state, keeps_state(kind)
        for name, outputs in projections_of(kind).items():
            setattr(self, name, nn.Linear(config.hidden_size, outputs * features, bias=bias))
        self.mixer = kind(width=features, length=config.max_position_embeddings, values=values)
        self.linear_out = to_residual(config, features, bias=bias)

    def forward(
        self, hidden: Tensor, layout: Layout, cache: SMLPCache | Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """hidden: <float>[B, T, D] -> <float>[B, T, D], and no loss."""
        inner = [project(getattr(self, name), hidden) for name in projections_of(type(self.mixer))]
        if self.state is None or not isinstance(cache, SMLPCache):
            mixed = mix(self.mixer, inner)
        elif self.keeps_state:
            mixed = self._continued(inner, layout, cache.layers[self.state])
        else:
            widths = [part.shape[-1] for part in inner]
            together = torch.cat(inner, dim=-1)[:, None]
            inner = list(so_far(together, self.state, layout, cache)[:, 0].split(widths, dim=-1))
            mixed = rows_of_call(mix(self.mixer, inner), layout)
        return project(self.linear_out, mixed.to(hidden.dtype)), None

    def _continued(self, inner: list[Tensor], layout: Layout, kept: SMLPCacheLayer) -> Tensor:
        """inner: [B, T, m F] of the new tokens -> <float>[B, T, F]."""
        # Before a sample's first token its state comes from padding alone, and is not read.
        fresh = layout.positions[:, 0] == 0
        if layout.valid is None and (layout.start is not None or not fresh.any()):
            return mix(self.mixer, inner, state=kept.state)
        # A state must not see padding: each sample continues with its own tokens.
        valid = torch.ones_like(layout.positions) if layout.valid is None else layout.valid
        length = valid.shape[1]
        rows, states = [], []
        for row, count in enumerate(valid.sum(dim=1).tolist()):
            before = {} if fresh[row] else kept.state
            state = {name: values[row : row + 1] for name, values in before.items()}
            new = [part[row : row + 1, : max(1, count)] for part in inner]
            # A sample without new tokens keeps the state that it has.
            mixed = mix(self.mixer, new, state=dict(state) if state and not count else state)
            rows.append(nn.functional.pad(mixed, (0, 0, 0, length - mixed.shape[1])))
            states.append(state)
        kept.state = {name: torch.cat([it[name] for it in states]) for name in states[0]}
        return torch.cat(rows)


class SMLPHostedRouter(nn.Module):
    """s = h W in fp32; a plugin's rule chooses and weighs."""

    def __init__(self, config: SMLPConfig) -> None:
        super().__init__()
        kind = register.token_routers[config.token_router]
        experts = config.num_experts or 1
        self.loss_coeff = config.moe_aux_loss_coeff
        self.weight = nn.Parameter(torch.empty(experts, config.hidden_size))
        values = _values(config, kind) | {"moe_router_topk": config.moe_router_topk or 1}
        self.rule = kind(num_experts=experts, values=values)

    def forward(self, tokens: Tensor, ids: Tensor | None, *, limited: bool) -> Routing:
        """tokens: <float>[n, D]."""
        with maybe_autocast(tokens.device.type, enabled=False):
            scores = self.rule.scores(tokens, self.weight)
        with torch.no_grad():
            chosen, visited = self.rule.choices(scores)
        loss = None
        if self.training and self.loss_coeff and len(scores):
            loss = self.rule.loss(scores, chosen)
        weights = self.rule.weigh(scores, chosen)
        experts = chosen.masked_fill(~visited, -1)
        loss = None if loss is None else self.loss_coeff * loss
        return Routing(experts, weights, loss, scores)


class SMLPHostedPrediction(SMLPPartialPrediction):
    """Partial prediction whose prefix is scored by a plugin's rule."""

    def _build(self, config: SMLPConfig) -> None:
        kind = register.feature_routers[config.feature_router]
        values = _values(config, kind)
        rule = kind(num_experts=self.num_experts, prefix_length=self.prefix, values=values)
        self.router = nn.ModuleDict({"rule": rule})

    @property
    def rule(self) -> Any:
        return self.router["rule"]

    def _of_prefix(self, means: Tensor, places: Tensor, counts: Tensor) -> Tensor:
        """Return the means of the prefix, <fp32>[B, P, C]; see the base class."""
        means = means.transpose(1, 2)
        prefix = means.new_zeros(len(means), self.prefix, means.shape[-1])
        return prefix.scatter_add(1, places[..., None].expand_as(means), means * counts[..., None])

    def _scored(self, kept: Tensor) -> Tensor:
        scores: Tensor = self.rule.scores(kept)
        return scores

    def _chosen(self, scores: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        experts = self.rule.choose(scores.detach())
        return experts, self.rule.weigh(scores, experts)


HOSTED.update(
    mixer=lambda config, index, name: SMLPHostedMixer(
        config, register.token_mixers[name], index * config.states_per_layer
    ),
    channel=lambda config, _, name: SMLPHostedMixer(config, register.channel_mixers[name], None),
    router=SMLPHostedRouter,
    features=SMLPHostedPrediction,
)


class _WithPlugins(SMLPPreTrainedModel):
    """Initializes plugins' parameters, and computes their buffers that are not saved."""

    auto_map = {  # noqa: RUF012 - read by its base
        "AutoModel": "modeling_plugin.SMLPPluginModel",
        "AutoModelForCausalLM": "modeling_plugin.SMLPPluginForCausalLM",
    }

    def post_init(self) -> None:
        """Name what transformers must load in fp32: the buffers of routers' rules."""
        rules = [part.rule for part in self.modules() if isinstance(part, SMLPHostedRouter)]
        buffers = {
            rf"\.rule\.{name}$"
            for rule in rules
            for name, buffer in rule.named_buffers()
            if buffer.is_floating_point()
        }
        self._keep_in_fp32_modules_strict = {*self._keep_in_fp32_modules_strict, *buffers}
        super().post_init()

    def initialize_weights(self) -> None:
        super().initialize_weights()
        compute_tables(self)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Weight):
            whole = torch.empty(module.weight.shape)
            module.init(whole)
            init.copy_(module.weight, whole)
        elif isinstance(module, SMLPHostedRouter):
            init.normal_(module.weight, std=self.config.initializer_range)


class SMLPPluginModel(_WithPlugins, SMLPModel):
    """Embeddings, layers and final norm."""


class SMLPPluginForCausalLM(_WithPlugins, SMLPForCausalLM):
    """The model with its output layer."""

    body = SMLPPluginModel


# See the end of modeling_smlp.py.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(
    f"{SMLPConfig.model_type}_plugin", SMLPPluginForCausalLM.__name__
)

__all__ = ["SMLPPluginForCausalLM", "SMLPPluginModel"]
