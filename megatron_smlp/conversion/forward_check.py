"""The last step of a conversion: compare the logits of both models for the same tokens.

The tokens are fixed, so that two conversions can be compared; weights are read back from what was
written, in fp32, one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megatron_smlp.errors import CheckpointError
from megatron_smlp.partial_prediction import prefix_length

LIMIT = 1e-4
"""For logits up to LARGE; it grows with larger ones, as rounding does."""
LARGE = 10.0
LOSS_LIMIT = 1e-3
SAMPLES = 2
TOKENS, ROUTED_TOKENS = 64, 16
"""From the start, and at least from where partial prediction routes."""


def fixed_tokens(flags: Mapping[str, Any]) -> Tensor:
    """Return <int64>[SAMPLES, T] for a model of these flags, the same on every machine."""
    prefix = prefix_length(SimpleNamespace(**flags), seq_length=flags["seq_length"])
    length = min(flags["seq_length"], max(TOKENS, prefix + ROUTED_TOKENS))
    generator = torch.Generator().manual_seed(20220314)
    return torch.randint(flags["vocab_size"], (SAMPLES, length), generator=generator)


def check(before: Tensor, after: Tensor) -> str:
    """Return a line that says how much the logits differ.

    before, after: <fp32>[B, T, V].

    Raises:
        CheckpointError: they differ by more than LIMIT allows, or are NaN.
    """
    common = min(before.shape[-1], after.shape[-1])  # padding of the vocabulary may differ
    difference = float((before[..., :common] - after[..., :common]).abs().max())
    text = f"forward check: logits of {before.shape[0]} x {before.shape[1]} tokens differ by "
    limit = LIMIT * max(1.0, float(before.abs().max()) / LARGE)
    if not difference <= limit:
        raise CheckpointError(
            f"{text}{difference:.2e}, over the limit {limit:.1e}: nothing was written. Please "
            "report it; --no-check writes the folder anyway."
        )
    return f"{text}at most {difference:.2e}"


def check_loss(before: Tensor, after: Tensor, tokens: Tensor, *, why_not: str | None) -> str:
    """Return a line that says how much the losses of a dense model and its sparse one differ.

    before, after: <fp32>[B, T, V]; tokens: <int64>[B, T].

    Args:
        why_not: why they are not the same; None: they must be.

    Raises:
        CheckpointError: they differ by more than LOSS_LIMIT without a reason, or are not finite.
    """
    old, new = loss(before, tokens), loss(after, tokens)
    text = f"forward check: loss {new:.6f}, dense model {old:.6f}: "
    if why_not is not None and math.isfinite(new):
        return f"{text}{abs(new - old):.1e} apart, since {why_not}"
    if abs(new - old) <= LOSS_LIMIT:
        return f"{text}{abs(new - old):.1e} apart"
    raise CheckpointError(
        f"{text}{abs(new - old):.1e} apart, over {LOSS_LIMIT:g}: nothing was written. Please "
        "report it; --no-check writes the folder anyway."
    )


def loss(logits: Tensor, tokens: Tensor) -> float:
    """Return the mean cross entropy of predicting each token from those before it, in nats.

    logits: <fp32>[B, T, V]; tokens: <int64>[B, T].
    """
    return float(functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))
