"""BASE: in training every expert gets as many tokens (Lewis et al. 2021, arXiv 2103.16716).

    s = h . w_e                    e(i) maximises sum_i s[i, e(i)], each expert floor or ceil of N/E
    y = sigmoid(h . w_e) f_e(h)    in evaluation e(i) = argmax s[i, :], nothing balanced or dropped

w_e <float>[E, D], orthogonal with gain 0.1. The choice has no gradient: w_e learns through the
sigmoid only. No loss is added. Since the assignment looks across the micro-batch, in training a
token's expert depends on other tokens, later ones included; in evaluation it does not.
Unlike the source, E is free of the number of processes, tokens are not shuffled between ranks (the
group is a micro-batch), and the assignment is ops/balanced_assignment.py, which always ends.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_smlp.ops.balanced_assignment import balanced_assignment
from megatron_smlp.routers.token_router import Choices, TokenRouter

INIT_GAIN = 0.1


class BaseRouter(TokenRouter):
    """See the top of the file."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.config.perform_initialization:
            # QR exists in fp32, not in the half precision that the weight may have.
            self.weight.data.copy_(nn.init.orthogonal_(torch.empty(self.weight.shape), INIT_GAIN))

    def choose(self, scores: Tensor) -> Choices:
        """One expert of each token; every choice is kept."""
        if self.training:
            # A step whose scores are not finite is found, and ended, by its loss.
            wanted = balanced_assignment(scores.nan_to_num())
        else:
            wanted = scores.argmax(dim=-1)
        every = torch.ones_like(wanted[:, None], dtype=torch.bool)
        return Choices(wanted[:, None], every, every)

    def weigh(self, scores: Tensor, wanted: Tensor) -> Tensor:
        """sigmoid of the chosen expert's score."""
        return scores.gather(1, wanted).sigmoid()
