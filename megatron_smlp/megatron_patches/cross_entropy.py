"""Cross entropy on a CPU that holds the whole vocabulary.

    loss = log(sum over v of exp(logits[v])) - logits[target]          in fp32

Megatron's is written for a vocabulary that is split over ranks, operation by operation: with one
rank on a CPU it reads and writes the fp32 logits a dozen times, where torch's does so half as
often. A split vocabulary, label smoothing and GPUs (for which Megatron has
`--cross-entropy-loss-fusion`) keep Megatron's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from megatron.core import parallel_state, tensor_parallel
from torch import Tensor
from torch.nn import functional


def apply() -> None:
    """Put it in place of Megatron's, where the model looks for that. Once per process."""
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
        """logits: <float>[T, B, V]; target: <int64>[T, B] -> <float32>[T, B]."""
        group = tp_group or parallel_state.get_tensor_model_parallel_group()
        if label_smoothing or group.size() > 1 or vocab_parallel_logits.device.type != "cpu":
            return megatrons(vocab_parallel_logits, target, label_smoothing, tp_group)
        logits = vocab_parallel_logits.float().flatten(0, -2)
        loss = functional.cross_entropy(logits, target.flatten(), reduction="none")
        return loss.view(target.shape)

    return cross_entropy
