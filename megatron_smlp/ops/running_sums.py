"""Running averages along the tokens, with exponential weights of any size.

    running_average:   y[t] = sum over s <= t of exp(k[s]) v[s]  /  sum over s <= t of exp(k[s])
    log_running_mean:  y[t] = log( (1 / t) sum over s <= t of exp(b[s]) )            t = 1, 2, ...

each feature by itself. Letters: T tokens, ... batch and features.

The exponents are not moved by their maximum: a maximum over all tokens would let a later token
change the rounding of an earlier row, and, where it is larger by 90, wipe that out in fp32. In
double precision exp() holds exponents up to 700, so sums are in double whatever the operands are.
What is kept for the backward pass are the operands alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _from_the_end(x: Tensor) -> Tensor:
    """Sum over s >= t, along the first dimension."""
    return x.flip(0).cumsum(0).flip(0)


class _RunningAverage(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keys: Tensor, values: Tensor) -> Tensor:
        ctx.save_for_backward(keys, values)
        weights = keys.double().exp()
        return ((weights * values).cumsum(0) / weights.cumsum(0)).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        """With S the sum of weights, over t >= s: dv[s] = exp(k[s]) sum of g / S, dk[s] the same of
        g (v[s] - y)."""
        keys, values = ctx.saved_tensors
        weights = keys.double().exp()
        total = weights.cumsum(0)
        average = (weights * values).cumsum(0) / total
        share = gradients[0] / total
        later = _from_the_end(share)
        of_keys = weights * (values * later - _from_the_end(share * average))
        return of_keys.to(keys.dtype), (weights * later).to(values.dtype)


def running_average(keys: Tensor, values: Tensor) -> Tensor:
    """keys, values: <float>[T, ...], |k| up to 700 -> <float>[T, ...], the precision of values."""
    return _RunningAverage.apply(keys, values)


class _LogRunningMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exponents: Tensor) -> Tensor:
        ctx.save_for_backward(exponents)
        sums = exponents.double().exp().cumsum(0)
        return (sums / _counts(sums)).log().to(exponents.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """db[s] = exp(b[s]) sum over t >= s of g[t] / (sum up to t of exp(b))."""
        (exponents,) = ctx.saved_tensors
        weights = exponents.double().exp()
        return (weights * _from_the_end(gradients[0] / weights.cumsum(0))).to(exponents.dtype)


def _counts(like: Tensor) -> Tensor:
    """1, 2, ..., T along the first dimension."""
    counts = torch.arange(1, len(like) + 1, device=like.device, dtype=like.dtype)
    return counts.view(-1, *(1,) * (like.dim() - 1))


def log_running_mean(exponents: Tensor) -> Tensor:
    """exponents: <float>[T, ...], |b| up to 700 -> <float>[T, ...], the same precision."""
    return _LogRunningMean.apply(exponents)
