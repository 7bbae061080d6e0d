"""Causal gating as one operator: the triangular product, its bias, GELU and the gate.

    g[t, b, k] = sum over s <= t of  M[h(k), t, s] * v[s, b, k]  + b[h(k), t]  (+ a[t, b, k])
    y = GELU(u1) * g

    dg = dy * GELU(u1)    du1 = dy * g * GELU'(u1)    dv = tri(M)' dg    dM = tril(dg v')
    db = sum of dg    da = dg

`gelu_gate` also computes v = LN(GELU(u2)), by head (gelu_norm.py), from u = [u1 | u2], the layer's
x U: here u is before GELU, in the layers' formulas behind it.

Routed, a head of a sample has one expert e up to token P and another from there on, with scale c:

    g[t, b, k] = c * sum over s <= t of  M[e, t, s] * v[s, b, k]  + b[e, t]      c = 1 where t < P

Letters: T tokens, B samples, H heads, K = H f features, head h(k) = k // f; N = B f; E matrices.

Triton kernels (kernels/gated_mix.py, kernels/gelu_norm.py; gated_mix_launches.py launches them)
read and write [T, B, K] as it lies in memory. The same computation in separate steps, with copies
by head, is in causal_mix.py, layers/spatial_gating.py and layers/feature_moe.py: that is the
reference, and the fallback where the kernels cannot run.
"""

import logging
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from megatron_smlp.ops import gated_mix_launches as launches
from megatron_smlp.ops.causal_mix import causal_mix
from megatron_smlp.ops.gelu_norm import (
    WIDEST,
    gelu_norm_reference,
    gradients_of_gelu_norm,
    normed_gelu,
)
from megatron_smlp.ops.triton_ready import use_kernels

_LOGGER = logging.getLogger(__name__)

ALIGNED = 16
"""Elements: a matrix whose rows start at multiples of this is read 16 bytes at a time."""


class Routing(NamedTuple):
    """The matrix and scale of each head of a sample."""

    experts: Tensor
    """<int32>[2, B, H], indices of matrices: in the prefix and after it."""
    scales: Tensor
    """<fp32>[B, H], after the prefix, with gradient."""
    prefix: int
    """P, tokens; at most T."""


def gates_by_kernels(
    u: Tensor, heads: int, activation: Callable[[Tensor], Tensor], length: int
) -> bool:
    """Return whether the kernels can take u = [u1 | u2]; on a GPU, log once why not.

    u: <float>[T', B, 2 K], T' <= T; heads: H; activation: the layer's; length: T of the matrices.
    """
    can = use_kernels("the causal gate", u, unsupported=_unsupported(u, heads, activation))
    if can and length % ALIGNED:
        _say_length_once(length)
    return can


@cache
def _say_length_once(length: int) -> None:
    _LOGGER.warning(
        "the causal gate reads its matrices element by element (slow): %s does not divide %s "
        "tokens; --seq-length %s is the next multiple.",
        *(ALIGNED, length, -(-length // ALIGNED) * ALIGNED),
    )


def _unsupported(u: Tensor, heads: int, activation: Callable[[Tensor], Tensor]) -> str:
    if activation is not functional.gelu:
        return f"it needs GELU, not {getattr(activation, '__name__', activation)}"
    if u.dtype not in (torch.bfloat16, torch.float16):
        return f"it needs bfloat16 or float16, not {u.dtype}"
    if u.shape[-1] > 2 * heads * WIDEST:
        return f"it takes up to {WIDEST} features a head, not {u.shape[-1] // heads // 2}"
    if torch.is_autocast_enabled(u.device.type):
        return "autocast is on"
    return ""


def gated_mix(
    u1: Tensor,
    values: Tensor,
    weight: Tensor,
    bias: Tensor,
    added: Tensor | None = None,
    routing: Routing | None = None,
) -> Tensor:
    """Return y of the formula at the top.

    u1, values, added: <float>[T, B, K], of one dtype, any strides; sums are in fp32.
    weight: <float>[H, T, T], entries above the diagonal affect no result and have a gradient of 0;
        bias: <float>[H, T]. Both may have any dtype; tiles of M are rounded to the dtype of v.
    routing: if given, weight is <float>[E, T, T], bias <float>[E, T], and `added` is None.
    Returns <float>[T, B, K], contiguous. Row t is bitwise independent of finite values at later
    positions. Differentiable once.
    Raises ValueError where the shapes do not fit.
    """
    _check_shapes(u1, values, weight, bias, added, routing)
    experts, scales, prefix = routing or (None, None, 0)
    if experts is not None and scales is not None:
        experts, scales = experts.contiguous(), scales.contiguous()
    return _GatedMix.apply(u1, values, weight, bias, added, experts, scales, prefix)


def gelu_gate(
    u: Tensor,
    norm: tuple[Tensor, Tensor, float],
    weight: Tensor,
    bias: Tensor,
    added: Tensor | None = None,
) -> Tensor:
    """Return y for u = [u1 | u2], with v = LN(GELU(u2)) by head.

    u: <float>[T, B, 2 K], any strides; norm: weight and bias of LN, <float>[K], and its eps; the
    others as for `gated_mix`. Both halves of the gradient of u are written into one tensor.
    """
    u1, u2 = u.chunk(2, dim=-1)
    _check_shapes(u1, u2, weight, bias, added)
    return _GeluGate.apply(u, *norm, weight, bias, added)


def gated_mix_reference(
    u1: Tensor,
    values: Tensor,
    weight: Tensor,
    bias: Tensor,
    added: Tensor | None = None,
    routing: Routing | None = None,
) -> Tensor:
    """Compute `gated_mix` slowly, one part after another. Same shapes and result."""
    _check_shapes(u1, values, weight, bias, added, routing)
    if routing is None:
        mixed = _mixed(values, weight, bias)
    else:
        parts = [_mixed_by_pair(values, weight, bias, routing, behind) for behind in (0, 1)]
        mixed = torch.cat([parts[0][: routing.prefix], parts[1][routing.prefix :]])
    return functional.gelu(u1) * (mixed if added is None else mixed + added)


def gelu_gate_reference(
    u: Tensor,
    norm: tuple[Tensor, Tensor, float],
    weight: Tensor,
    bias: Tensor,
    added: Tensor | None = None,
) -> Tensor:
    """Compute `gelu_gate` slowly, in separate operators."""
    u1, u2 = u.chunk(2, dim=-1)
    values, _ = gelu_norm_reference(u2, *norm[:2], len(weight), norm[2])
    return gated_mix_reference(u1, values, weight, bias, added)


def _mixed(values: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    tokens, batch, features = values.shape
    columns = values.unflatten(2, (len(weight), -1)).permute(2, 0, 1, 3).flatten(2)
    mixed = causal_mix(weight, columns) + bias[:, :, None]
    mixed = mixed.view(len(weight), tokens, batch, features // len(weight))
    return mixed.permute(1, 2, 0, 3).reshape(values.shape)


def _mixed_by_pair(
    values: Tensor, weight: Tensor, bias: Tensor, routing: Routing, behind: int
) -> Tensor:
    """Return g as if all tokens were in the prefix or, if `behind`, after it."""
    experts = routing.experts[behind].long()
    scales = routing.scales if behind else torch.ones_like(routing.scales)
    columns = values.unflatten(2, (experts.shape[1], -1))  # [T, B, H, f]
    product = torch.einsum("bhts,sbhf->tbhf", weight.tril()[experts].to(values.dtype), columns)
    shift = bias[experts].permute(2, 0, 1)[..., None]
    return (product * scales[..., None] + shift).to(values.dtype).flatten(2)


def _check_shapes(
    u1: Tensor,
    values: Tensor,
    weight: Tensor,
    bias: Tensor,
    added: Tensor | None,
    routing: Routing | None = None,
) -> None:
    tokens, heads = len(values), len(weight)
    fits = values.dim() == 3 and u1.shape == values.shape
    fits = fits and weight.shape == (heads, tokens, tokens) and bias.shape == (heads, tokens)
    if routing is not None:
        heads = routing.experts.shape[-1]
        fits = fits and routing.experts.shape == (2, *routing.scales.shape)
        fits = fits and routing.scales.shape == (values.shape[1], heads)
        fits = fits and 0 <= routing.prefix <= tokens and added is None
    fits = fits and values.shape[2] % heads == 0
    if not fits or (added is not None and added.shape != values.shape):
        raise ValueError(
            f"gated_mix: u1 {tuple(u1.shape)}, values {tuple(values.shape)}, weight "
            f"{tuple(weight.shape)} and bias {tuple(bias.shape)} do not match: expected u1, values "
            "[T, B, K], weight [H, T, T] and bias [H, T], H a divisor of K"
        )


class _GatedMix(torch.autograd.Function):
    """See `gated_mix`."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        u1: Tensor,
        values: Tensor,
        weight: Tensor,
        bias: Tensor,
        added: Tensor | None,
        experts: Tensor | None,
        scales: Tensor | None,
        prefix: int,
    ) -> Tensor:
        output, kept = launches.gate(u1, values, weight, bias, added, experts, scales, prefix)
        ctx.save_for_backward(u1, values, weight, bias, experts, scales, kept)
        ctx.prefix = prefix
        return output

    @staticmethod
    @once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        u1, values, weight, bias, experts, scales, kept = ctx.saved_tensors
        of_u1 = torch.empty(u1.shape, dtype=u1.dtype, device=u1.device)
        routing = (experts, scales, ctx.prefix)
        upstream, shifts, of_scales = launches.gradients_of_gate(
            gradients[0], u1, kept, bias, *routing, of_u1
        )
        of_values = launches.gradients_of_values(upstream, weight, *routing)
        of_weight = of_bias = None
        if any(ctx.needs_input_grad[2:4]):
            of_weight, of_bias = launches.gradients_of_weights(
                upstream, values, shifts, bias, weight.dtype, *routing
            )
        answers = (of_u1, of_values, of_weight, of_bias, upstream, None, of_scales, None)
        return tuple(
            answer if needed else None
            for answer, needed in zip(answers, ctx.needs_input_grad, strict=True)
        )


class _GeluGate(torch.autograd.Function):
    """See `gelu_gate`."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        u: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        eps: float,
        weight: Tensor,
        bias: Tensor,
        added: Tensor | None,
    ) -> Tensor:
        u1, u2 = u.chunk(2, dim=-1)
        values, means, scales = normed_gelu(u2, norm_weight, norm_bias, len(weight), eps)
        output, mixed = launches.gate(u1, values, weight, bias, added, None, None, 0)
        ctx.save_for_backward(u, norm_weight, means, scales, values, weight, bias, mixed)
        return output

    @staticmethod
    @once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        u, norm_weight, means, scales, values, weight, bias, mixed = ctx.saved_tensors
        of_u = torch.empty(u.shape, dtype=u.dtype, device=u.device)
        (u1, u2), (of_u1, of_u2) = u.chunk(2, dim=-1), of_u.chunk(2, dim=-1)
        plain = (None, None, 0)
        upstream, shifts, _ = launches.gradients_of_gate(
            gradients[0], u1, mixed, bias, *plain, of_u1
        )
        of_weight = of_bias = None
        if any(ctx.needs_input_grad[4:6]):
            of_weight, of_bias = launches.gradients_of_weights(
                upstream, values, shifts, bias, weight.dtype, *plain
            )
        of_values = launches.gradients_of_values(upstream, weight, *plain)
        of_norm = gradients_of_gelu_norm(of_values, None, u2, norm_weight, means, scales, of_u2)
        answers = (of_u, *of_norm, None, of_weight, of_bias, upstream)
        return tuple(
            answer if needed else None
            for answer, needed in zip(answers, ctx.needs_input_grad, strict=True)
        )
