"""Balanced assignment: every token gets one expert, every expert floor or ceil of N/E tokens.

On a CPU, host_assignment.py computes it, and describes the problem and its three steps. On a GPU,
the kernels of triton_assignment.py do, or where they cannot run, device_assignment.py in some
hundred operators; neither of these ever makes the host wait.

Letters: N tokens, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_smlp.ops.device_assignment import device_assignment
from megatron_smlp.ops.host_assignment import host_assignment
from megatron_smlp.ops.triton_assignment import triton_assignment, unsupported
from megatron_smlp.ops.triton_ready import use_kernels


def balanced_assignment(scores: Tensor) -> Tensor:
    """Assign each token to one expert, evenly, so that the summed score is as large as possible.

    scores: <float>[N, E], any floating type, CPU or GPU, finite; no gradient flows.
    Returns <int64>[N] on the device of the scores: the expert of each token. Every expert gets
    floor(N/E) or ceil(N/E) tokens, whatever the scores are (tied, identical, extreme). The result
    depends on the scores only, not on any random state.
    Raises ValueError if the scores are not all finite, on a CPU only.
    """
    return priced_assignment(scores)[0]


def priced_assignment(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return `balanced_assignment` and the prices that it was rounded from.

    scores: as there.
    Returns the experts <int64>[N] and prices <fp32>[E], of mean 0, in the unit of the scores: the
    argmax of s[i, :] - p is nearly as even.
    Raises ValueError as there; on a GPU the check would make the host wait.
    """
    if scores.device.type == "cuda":
        if use_kernels("balanced assignment", scores, unsupported=unsupported(scores)):
            return triton_assignment(scores)
        return device_assignment(scores)
    _check(scores)
    return host_assignment(scores)


def _check(scores: Tensor) -> None:
    num_bad = scores.numel() - int(torch.isfinite(scores).sum())
    if num_bad:
        raise ValueError(
            f"balanced_assignment: {num_bad} of {scores.numel()} scores are NaN or infinite; look "
            "for a diverged router or an overflow in reduced precision before this call"
        )
