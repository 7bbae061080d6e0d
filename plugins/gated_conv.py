"""A gated causal convolution, the mixer of docs/own-mixer.md.

y_t = sigmoid(g_t) * sum over j < k of c_j v_{t-j},    g, v = x W_g, x W_v;    out = y W
"""

from torch import Tensor, cat
from torch.nn.functional import pad

from megatron_smlp.plugins import State, TokenMixer, normal, option, register


@register("gated_conv")
class GatedConv(TokenMixer):
    inner = {"gate": 1, "value": 1}
    taps: int = option(4, "tokens that a position reads, itself included", smallest=1)

    def build(self, width: int, length: int) -> None:
        self.kernel = self.parameter(width, self.taps, cut=0, init=normal(0.5))

    def forward(self, gate: Tensor, value: Tensor, state: State = None) -> Tensor:
        kernel, length, before = self.kernel(), value.shape[1], self.taps - 1
        # late[:, t + j] is v_{t - (taps - 1 - j)}
        late = cat([state["late"], value], 1) if state else pad(value, (0, 0, before, 0))
        if state is not None:  # generation goes on behind these tokens
            state["late"] = late[:, length:]
        mixed = sum(late[:, j : j + length] * kernel[:, j] for j in range(self.taps))
        return gate.sigmoid() * mixed


register.architecture("gated_conv", mixer="gated_conv", channel="mlp")
