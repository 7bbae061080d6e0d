"""Causal gating as one operator: the triangular product, its bias and the gate.

    g[t, b, k] = sum over s <= t of  M[h(k), t, s] * v[s, b, k]  + b[h(k), t]  (+ a[t, b, k])
    y = u1 * g

    dg = dy * u1    du1 = dy * g    dv = tri(M)' dg    dM = tril(dg v')    db = sum of dg    da = dg

Letters: T tokens, B samples, H heads, K = H f features, head h(k) = k // f; N = B f.

Triton kernels (kernels/gating.py), which read and write [T, B, K] where it lies. What the parts
need one after another, copies by head among them, is in causal_mix.py and layers/spatial_gating.py:
that is the slow twin, and what runs where the kernels cannot.
"""

import torch
from torch import Tensor

from megatron_smlp.ops.causal_mix import causal_mix
from megatron_smlp.ops.triton_ready import use_kernels

_ROWS, _DEPTH, _COLUMNS = 128, 64, 128  # of a tile of g and dv
_WEIGHT_ROWS = 64  # of a square tile of dM: enough of them for all multiprocessors
_NUM_WARPS = 8


def gates_by_kernels(u1: Tensor, values: Tensor) -> bool:
    """Return whether `gated_mix` can take these operands; says why not, once, on a GPU."""
    return use_kernels("the causal gate", values, unsupported=_unsupported(u1, values))


def _unsupported(u1: Tensor, values: Tensor) -> str:
    if values.dtype not in (torch.bfloat16, torch.float16):
        return f"it is for bfloat16 and float16, not {values.dtype}"
    if u1.dtype != values.dtype:
        return f"u1 has {u1.dtype} and v {values.dtype}"
    if torch.is_autocast_enabled(values.device.type):
        return "autocast is on"
    return ""


def gated_mix(
    u1: Tensor, values: Tensor, weight: Tensor, bias: Tensor, added: Tensor | None = None
) -> Tensor:
    """Return y of the formula at the top.

    u1, values, added: <float>[T, B, K], of one dtype, any strides; sums are in fp32.
    weight: <float>[H, T, T], what is above the diagonal is in no result and has a gradient of 0;
        bias: <float>[H, T]. Their dtypes are free; tiles of M are rounded to the dtype of v.
    Returns <float>[T, B, K], contiguous. Row t is bitwise independent of finite values at later
    positions. Differentiable once.
    Raises ValueError where the shapes do not fit.
    """
    _check_shapes(u1, values, weight, bias, added)
    result: tuple[Tensor, Tensor] = _gated_mix(u1, values, weight, bias, added)
    return result[0]


def gated_mix_reference(
    u1: Tensor, values: Tensor, weight: Tensor, bias: Tensor, added: Tensor | None = None
) -> Tensor:
    """The slow twin of `gated_mix`, one part after another. Same shapes and result."""
    _check_shapes(u1, values, weight, bias, added)
    tokens, batch, features = values.shape
    columns = values.unflatten(2, (len(weight), -1)).permute(2, 0, 1, 3).flatten(2)
    mixed = causal_mix(weight, columns) + bias[:, :, None]
    mixed = mixed.view(len(weight), tokens, batch, features // len(weight))
    mixed = mixed.permute(1, 2, 0, 3).reshape(values.shape)
    return u1 * (mixed if added is None else mixed + added)


def _check_shapes(
    u1: Tensor, values: Tensor, weight: Tensor, bias: Tensor, added: Tensor | None
) -> None:
    heads, tokens = len(weight), len(values)
    fits = values.dim() == 3 and u1.shape == values.shape and values.shape[2] % heads == 0
    fits = fits and weight.shape == (heads, tokens, tokens) and bias.shape == (heads, tokens)
    if not fits or (added is not None and added.shape != values.shape):
        raise ValueError(
            f"gated_mix: u1 {tuple(u1.shape)}, values {tuple(values.shape)}, weight "
            f"{tuple(weight.shape)} and bias {tuple(bias.shape)} do not fit; u1, values [T, B, K], "
            "weight [H, T, T] and bias [H, T] with H a divisor of K are needed"
        )


def _rows_ready(tensor: Tensor) -> Tensor:
    """The tensor itself where features lie side by side, else a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _strided(tensor: Tensor) -> tuple[Tensor, int, int]:
    """What a kernel is told of [T, B, K]."""
    return tensor, tensor.stride(0), tensor.stride(1)


def _tiles(values: Tensor, heads: int) -> dict[str, int]:
    """The part of a kernel's arguments that does not depend on what it computes."""
    _, batch, features = values.shape
    width = features // heads
    return {"T": len(values), "N": batch * width, "WIDTH": width, "num_warps": _NUM_WARPS}


def _grid(tile: dict[str, int], heads: int) -> tuple[int, int, int]:
    return -(-tile["T"] // _ROWS), -(-tile["N"] // _COLUMNS), heads


@torch.library.custom_op("megatron_smlp::gated_mix", mutates_args=())
def _gated_mix(
    u1: Tensor, values: Tensor, weight: Tensor, bias: Tensor, added: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y, and g, which the backward needs."""
    from megatron_smlp.ops.kernels import gating as kernels

    out, mixed = values.new_empty(values.shape), values.new_empty(values.shape)
    if values.numel() == 0:
        return out, mixed
    u1, values, weight = _rows_ready(u1), _rows_ready(values), _rows_ready(weight)
    third = u1 if added is None else _rows_ready(added)
    tile = _tiles(values, len(weight))
    kernels.gated_mix[_grid(tile, len(weight))](
        *(weight, *weight.stride()[:2], _rows_ready(bias), bias.stride(0)),
        *(*_strided(values), *_strided(u1), *_strided(third), out, *_strided(mixed)),
        **tile,
        HAS_ADDED=added is not None,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
        DEPTH=_DEPTH,
    )
    return out, mixed


@torch.library.custom_op("megatron_smlp::gated_mix_gradients_of_operands", mutates_args=())
def _gradients_of_operands(
    gradient: Tensor, u1: Tensor, weight: Tensor, mixed: Tensor, has_added: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """du1, dv, and da, which is empty where nothing was added."""
    from megatron_smlp.ops.kernels import gating as kernels

    of_gate, of_values = mixed.new_empty(mixed.shape), mixed.new_empty(mixed.shape)
    of_added = mixed.new_empty(mixed.shape if has_added else (0,))
    if mixed.numel() == 0:
        return of_gate, of_values, of_added
    gradient, u1, weight = _rows_ready(gradient), _rows_ready(u1), _rows_ready(weight)
    tile = _tiles(mixed, len(weight))
    kernels.gradients_of_operands[_grid(tile, len(weight))](
        *(weight, *weight.stride()[:2], *_strided(gradient), *_strided(u1)),
        *(mixed, of_values, of_gate, of_added, *mixed.stride()[:2]),
        **tile,
        HAS_ADDED=has_added,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
        DEPTH=_DEPTH,
    )
    return of_gate, of_values, of_added


@torch.library.custom_op("megatron_smlp::gated_mix_gradients_of_weights", mutates_args=())
def _gradients_of_weights(
    gradient: Tensor, u1: Tensor, values: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """dM and db."""
    from megatron_smlp.ops.kernels import gating as kernels

    heads, tokens = bias.shape
    of_weight = weight.new_empty(heads, tokens, tokens)
    of_bias = bias.new_empty(heads, tokens)
    if values.numel() == 0:
        return of_weight.zero_(), of_bias.zero_()
    gradient, u1, values = _rows_ready(gradient), _rows_ready(u1), _rows_ready(values)
    blocks = -(-tokens // _WEIGHT_ROWS)
    kernels.gradients_of_weights[(blocks, blocks, heads)](
        *(*_strided(gradient), *_strided(u1), *_strided(values), of_weight, of_bias),
        **_tiles(values, heads) | {"num_warps": _NUM_WARPS // 2},
        ROWS=_WEIGHT_ROWS,
        DEPTH=_DEPTH,
    )
    return of_weight, of_bias


@_gated_mix.register_fake
def _(
    u1: Tensor, values: Tensor, weight: Tensor, bias: Tensor, added: Tensor | None
) -> tuple[Tensor, Tensor]:
    return values.new_empty(values.shape), values.new_empty(values.shape)


@_gradients_of_operands.register_fake
def _(
    gradient: Tensor, u1: Tensor, weight: Tensor, mixed: Tensor, has_added: bool
) -> tuple[Tensor, Tensor, Tensor]:
    added = mixed.new_empty(mixed.shape if has_added else (0,))
    return mixed.new_empty(mixed.shape), mixed.new_empty(mixed.shape), added


@_gradients_of_weights.register_fake
def _(
    gradient: Tensor, u1: Tensor, values: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    return weight.new_empty(*bias.shape, bias.shape[1]), bias.new_empty(bias.shape)


def _save(
    ctx: torch.autograd.function.FunctionCtx,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None],
    output: tuple[Tensor, Tensor],
) -> None:
    u1, values, weight, bias, added = inputs
    ctx.save_for_backward(u1, values, weight, bias, output[1])
    ctx.has_added = added is not None


def _backward(
    ctx: torch.autograd.function.FunctionCtx, gradient: Tensor, of_mixed: Tensor
) -> tuple[Tensor | None, ...]:
    """of_mixed: zeros, since g is handed to nobody."""
    u1, values, weight, bias, mixed = ctx.saved_tensors
    has_added: bool = ctx.has_added
    of_gate, of_values, of_added = _gradients_of_operands(gradient, u1, weight, mixed, has_added)
    of_weight = of_bias = None
    if any(ctx.needs_input_grad[2:4]):
        of_weight, of_bias = _gradients_of_weights(gradient, u1, values, weight, bias)
    return of_gate, of_values, of_weight, of_bias, of_added if has_added else None


_gated_mix.register_autograd(_backward, setup_context=_save)
