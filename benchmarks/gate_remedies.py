"""Remedies for BASE's closed gates, as a plugin that benchmarks/gate_factorial.py trains with.

    none     y = sigmoid(x . w_e) f_e(x)                       x after the norm
    loss     the same, with L = -mean over all tokens of [e is not argmax s] sigmoid(s_e)
             (StableMoE, Dai et al. 2022, arXiv 2204.08396), times --moe-aux-loss-coeff
    cosine   s = x . w_e / (|x| |w_e| 0.5): no gate is under sigmoid(-2) = 0.12
    scaled   s = x . w_e / sqrt(D)

e is BASE's balanced assignment in training, argmax s in evaluation. `--base-gate price` of the
package is the remedy that docs/decisions/0080-gates-by-prices.md chose.
"""

from typing import Literal

from torch import Tensor
from torch.nn.functional import linear, normalize

from megatron_smlp.ops.balanced_assignment import priced_assignment
from megatron_smlp.plugins import TokenRouter, option, register

TEMPERATURE = 0.5


@register("base_remedy")
class BaseRemedy(TokenRouter):
    remedy: Literal["none", "loss", "cosine", "scaled"] = option("none", "what keeps gates open")

    def scores(self, hidden: Tensor, weight: Tensor) -> Tensor:
        hidden, weight = hidden.float(), weight.float()
        if self.remedy == "cosine":
            return linear(normalize(hidden, dim=-1), normalize(weight, dim=-1)) / TEMPERATURE
        scale = weight.shape[1] ** -0.5 if self.remedy == "scaled" else 1.0
        return scale * linear(hidden, weight)

    def choose(self, scores: Tensor) -> Tensor:
        if not self.training:
            return scores.argmax(dim=-1, keepdim=True)
        return priced_assignment(scores)[0][:, None]

    def weigh(self, scores: Tensor, chosen: Tensor) -> Tensor:
        return scores.gather(1, chosen).sigmoid()

    def loss(self, scores: Tensor, chosen: Tensor) -> Tensor | None:
        if self.remedy != "loss":
            return None
        forced = chosen != scores.argmax(dim=-1, keepdim=True)
        return -(self.weigh(scores, chosen) * forced).mean()
