"""A plugin for tests: a whole mixer with a norm over all features and a gated channel mixer,
in layers that alternate with attention; and a token router with parameters of its own and a loss.
"""

import torch
from torch.nn.functional import layer_norm, silu

from megatron_smlp.plugins import (
    ChannelMixer,
    TokenMixer,
    TokenRouter,
    normal,
    ones,
    option,
    register,
)


@register("normed_mean")
class NormedMean(TokenMixer):
    inner = {"value": 1}
    whole = True

    def build(self, width, length):
        self.scale = self.parameter(width, cut=None, init=ones)

    def forward(self, value):
        count = torch.arange(1, value.shape[1] + 1, device=value.device)[:, None]
        mean = value.float().cumsum(1) / count
        return layer_norm(mean, mean.shape[-1:]).to(value.dtype) * self.scale()


@register("glu2")
class GLU(ChannelMixer):
    inner = {"gate": 1, "value": 2}
    power: float = option(1.0, "exponent", smallest=0.0)

    @classmethod
    def features(cls, *, hidden_size, ffn_hidden_size, values):
        return ffn_hidden_size

    def build(self, width, length):
        self.mix = self.parameter(2, cut=None, init=normal(1.0))
        self.bias = self.parameter(width, cut=0, init=normal(0.1))

    def forward(self, gate, value):
        return silu(gate + self.bias()) * (value @ self.mix())


@register("tempered")
class Tempered(TokenRouter):
    def __init__(self, **host):
        super().__init__(**host)
        self.heat = self.parameter(1, init=ones)
        self.shift = self.parameter(self.num_experts, init=normal(0.1))

    def scores(self, hidden, weight):
        return super().scores(hidden, weight) * self.heat().float() + self.shift().float()

    def weigh(self, scores, chosen):
        return super().weigh(scores, chosen) * self.heat().float()

    def loss(self, scores, chosen):
        return scores.logsumexp(dim=-1).square().mean() + self.heat().float().square().sum()


def layers(number: int, count: int) -> tuple[str, str]:
    return ("normed_mean", "glu2") if number % 2 else ("attention", "mlp")


register.architecture("mixed", layers=layers)
