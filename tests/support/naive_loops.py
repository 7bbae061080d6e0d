"""Compare a layer with a naive loop over its formula."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Mix = Callable[[Tensor], Tensor]


def assert_equals(
    layer: nn.Module, ours: Mix, naive: Mix, values: Tensor, *, rtol: float, atol: float
) -> None:
    """Compare outputs, and gradients of the input and of every parameter.

    values: <float>[2, ...]: the input, and the gradient of the output.
    """
    names = dict(layer.named_parameters())
    values, upstream = values
    results = []
    for function in (ours, naive):
        inputs = values.clone().requires_grad_()
        output = function(inputs)
        results.append([output, *torch.autograd.grad(output, [inputs, *names.values()], upstream)])
    for name, left, right in zip(["output", "input", *names], *results, strict=True):
        torch.testing.assert_close(
            left, right, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )
