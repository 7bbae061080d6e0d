"""Balanced assignment: every token gets one expert, every expert floor or ceil of N/E tokens.

host_assignment.py computes it, and describes the problem and its three steps. On a GPU the kernels
of triton_assignment.py do, which never make the host wait.

Letters: N tokens, E experts.
"""

from __future__ import annotations

from torch import Tensor

from megatron_smlp.ops.host_assignment import host_assignment
from megatron_smlp.ops.triton_assignment import triton_assignment, unsupported
from megatron_smlp.ops.triton_ready import use_kernels


def priced_assignment(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Assign each token to one expert, evenly, so that the summed score is as large as possible.

    scores: <float>[N, E], any floating type, CPU or GPU, finite; no gradient flows.
    Returns, on their device, the expert of each token <int64>[N] and the prices that the assignment
    was rounded from <fp32>[E], of mean 0, in the unit of the scores: the argmax of s[i, :] - p is
    nearly as even. Every expert gets floor(N/E) or ceil(N/E) tokens, whatever the scores are (tied,
    identical, extreme). The result depends on the scores only, not on any random state.
    """
    if use_kernels("balanced assignment", scores, unsupported=unsupported(scores)):
        return triton_assignment(scores)
    return host_assignment(scores)
