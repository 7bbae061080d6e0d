"""Cross entropy on a CPU that holds the whole vocabulary.

    loss = log(sum over v of exp(logits[v])) - logits[target]          in fp32

Megatron's version is written for a vocabulary split over ranks, one operation at a time: with one
rank on a CPU it reads and writes the fp32 logits a dozen times. This one converts a few rows at a
time to fp32, which fit a core's cache; the loss is bitwise equal to torch's over all rows. A split
vocabulary, label smoothing and GPUs (for which Megatron has `--cross-entropy-loss-fusion`) still
use Megatron's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from megatron_smlp.ops.rows import in_rows

ELEMENTS = 2**18
"""Number of logits in fp32 at a time: 1 MiB."""


def apply() -> None:
    """Replace Megatron's function where the model looks it up, once per process."""
    megatrons = tensor_parallel.vocab_parallel_cross_entropy
    if not hasattr(megatrons, "__wrapped__"):
        tensor_parallel.vocab_parallel_cross_entropy = _whole_on_cpu(megatrons)


def _whole_on_cpu(megatrons: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(megatrons)
    def cross_entropy(
        vocab_parallel_logits: Tensor,
        target: Tensor,
        label_smoothing: float = 0.0,
        tp_group: Any = None,
    ) -> Tensor:
        """logits: <float>[T, B, V]; target: <int64>[T, B] -> losses <float32>[T, B]."""
        group = tp_group or parallel_state.get_tensor_model_parallel_group()
        if label_smoothing or group.size() > 1 or vocab_parallel_logits.device.type != "cpu":
            return megatrons(vocab_parallel_logits, target, label_smoothing, tp_group)
        loss: Tensor = _ByRows.apply(vocab_parallel_logits.flatten(0, -2), target.flatten())
        return loss.view(target.shape)

    return cross_entropy


class _ByRows(torch.autograd.Function):
    """logits: <float>[n, V], target: <int64>[n] -> <float32>[n]; the gradient in logits' dtype."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(logits, target)
        losses = [
            functional.cross_entropy(wide.float(), correct, reduction="none")
            for wide, correct in in_rows(ELEMENTS, logits, target)
        ]
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, target = ctx.saved_tensors
        result = torch.empty_like(logits)
        for some, correct, scale, into in in_rows(ELEMENTS, logits, target, gradient, result):
            excess = some.float().softmax(-1)  # softmax(logits) - [v is the target]
            excess[torch.arange(len(correct)), correct] -= 1
            into.copy_(excess.mul_(scale[:, None]))
        return result, None
