"""GELU and LayerNorm by head in one pass over memory, and one for the backward.

    a = GELU(u2)    m = mean(a)    v = (a - m) / sqrt(var(a) + eps) * w + b      over a head's f
                                                                                 features

Triton kernels (kernels/gelu_norm.py) for what layers/spatial_gating.py does with torch's functions,
which are the reference; u2 is before GELU here. Letters: T tokens, B samples, H heads, K = H f
features.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from megatron_smlp.ops.triton_ready import FUSED, rows_ready, strided

WIDEST = 8192
"""Most features of a head that a program can hold."""
_ELEMENTS = 4096  # of a program's block, where a head has fewer
_PROGRAMS = 256  # that share the lines of a head in the backward: two for each multiprocessor


def gelu_norm_reference(
    inputs: Tensor, weight: Tensor, bias: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Compute v, <float>[T, B, K], and m, <fp32 or wider>[T, B, H], slowly. Shapes as below."""
    wide = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
    active = functional.gelu(wide).unflatten(-1, (heads, -1))
    normed = functional.layer_norm(active, active.shape[-1:], eps=eps).flatten(-2)
    return (normed * weight + bias).to(inputs.dtype), active.mean(-1)


def gelu_norm(
    inputs: Tensor, weight: Tensor, bias: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Return v and m of the formula at the top.

    inputs: u2, <float>[T, B, K], any strides; weight, bias: <float>[K]; heads: H, a divisor of K.
    Returns <float>[T, B, K] of the inputs' dtype and <fp32>[T, B, H]. Statistics are in fp32.
    Differentiable once.
    """
    return _GeluNorm.apply(inputs, weight, bias, heads, eps)


class _GeluNorm(torch.autograd.Function):
    """See `gelu_norm`."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor,
        heads: int,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        values, means, scales = normed_gelu(inputs, weight, bias, heads, eps)
        ctx.save_for_backward(inputs, weight, means, scales)
        ctx.set_materialize_grads(False)
        return values, means

    @staticmethod
    @once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        of_values, of_means = gradients
        inputs, weight, means, scales = ctx.saved_tensors
        if of_values is None:
            of_values = torch.zeros_like(inputs)
        of_inputs = torch.empty(inputs.shape, dtype=inputs.dtype, device=inputs.device)
        of_weight, of_bias = gradients_of_gelu_norm(
            of_values, of_means, inputs, weight, means, scales, of_inputs
        )
        return of_inputs, of_weight, of_bias, None, None


def _block(width: int) -> dict[str, int]:
    """Return the block in which a program holds the features of a head."""
    block = 1 << (width - 1).bit_length()
    rows = max(1, _ELEMENTS // block)
    warps = min(16, max(4, block // 1024))
    return {"WIDTH": width, "BLOCK": block, "ROWS": rows, "num_warps": warps} | FUSED


def normed_gelu(
    inputs: Tensor, weight: Tensor, bias: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return v, m, and 1 / sqrt(var(a) + eps): <fp32>[T, B, H]."""
    from megatron_smlp.ops.kernels import gelu_norm as kernels

    tokens, batch, features = inputs.shape
    values = inputs.new_empty(inputs.shape)
    means = inputs.new_empty((tokens, batch, heads), dtype=torch.float32)
    scales = torch.empty_like(means)
    if inputs.numel() == 0:
        return values, means.zero_(), scales.zero_()
    block = _block(features // heads)
    kernels.normed_gelu[(-(-tokens * batch // block["ROWS"]), heads)](
        *(*strided(rows_ready(inputs)), weight.contiguous(), bias.contiguous()),
        *(values, means, scales),
        LINES=tokens * batch,
        BATCH=batch,
        EPS=eps,
        **block,
    )
    return values, means, scales


def gradients_of_gelu_norm(
    of_values: Tensor,
    of_means: Tensor | None,
    inputs: Tensor,
    weight: Tensor,
    means: Tensor,
    scales: Tensor,
    of_inputs: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return dw and db; write du2 into of_inputs, whose features are contiguous."""
    from megatron_smlp.ops.kernels import gelu_norm as kernels

    (tokens, batch, features), heads = inputs.shape, means.shape[2]
    if inputs.numel() == 0:
        return torch.zeros_like(weight), torch.zeros_like(weight)
    block = _block(features // heads)
    programs = min(_PROGRAMS, -(-tokens * batch // block["ROWS"]))
    parts = inputs.new_empty((2, programs, features), dtype=torch.float32)
    kernels.gradients[(programs, heads)](
        *(of_values.contiguous(), means if of_means is None else of_means.contiguous()),
        *(*strided(rows_ready(inputs)), weight.contiguous(), means, scales),
        *(*strided(of_inputs), *parts),
        LINES=tokens * batch,
        BATCH=batch,
        HAS_MEANS=of_means is not None,
        **block,
    )
    of_weight, of_bias = (part.sum(dim=0).to(weight.dtype) for part in parts)
    return of_weight, of_bias
