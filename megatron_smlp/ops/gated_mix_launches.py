"""How the kernels of the causal gate are launched: tiles, grids, memory of results.

Formulas and letters are at the top of gated_mix.py, whose autograd functions call these.
"""

import torch
from torch import Tensor

from megatron_smlp.ops.triton_ready import FUSED, rows_ready, strided

_ROWS, _DEPTH, _COLUMNS = 128, 64, 128  # of a tile of g and dv
_WEIGHT_ROWS = 64  # of a square tile of dM: enough of them for all multiprocessors
_GATE_ROWS, _GATE_COLUMNS = 32, 128  # of a tile of dg and du1
_NUM_WARPS = 8


def _tiles(
    values: Tensor, matrices: int, experts: Tensor | None, prefix: int
) -> tuple[tuple[int, int, int], dict[str, int]]:
    """Return the grid of a product, and the part of its arguments that all products share."""
    tokens, batch, features = values.shape
    heads = matrices if experts is None else experts.shape[-1]
    width = features // heads
    columns = _COLUMNS
    if experts is not None:  # blocks of columns lie in one sample
        columns = min(columns, max(16, 1 << (width - 1).bit_length()))
    sizes = {"T": tokens, "N": batch * width, "PREFIX": prefix, "WIDTH": width}
    sizes |= {"ROUTED": experts is not None, "COLUMNS": columns, "DEPTH": _DEPTH}
    sizes |= {"ROWS": _ROWS, "num_warps": _NUM_WARPS} | FUSED
    blocks = -(-batch * width // columns) if experts is None else batch * -(-width // columns)
    return (-(-tokens // _ROWS), blocks, heads), sizes


def _row_blocks(tokens: int, prefix: int, rows: int) -> int:
    """Blocks of rows of which none lies on both sides of the prefix's end."""
    return -(-prefix // rows) + -(-(tokens - prefix) // rows)


def gate(
    u1: Tensor,
    values: Tensor,
    weight: Tensor,
    bias: Tensor,
    added: Tensor | None,
    experts: Tensor | None,
    scales: Tensor | None,
    prefix: int,
) -> tuple[Tensor, Tensor]:
    """y, and what the backward needs: g, or the product where it is routed."""
    from megatron_smlp.ops.kernels import gated_mix as kernels

    out, mixed = values.new_empty(values.shape), values.new_empty(values.shape)
    if values.numel() == 0:
        return out, mixed
    u1, values, weight, bias = (rows_ready(each) for each in (u1, values, weight, bias))
    third = u1 if added is None else rows_ready(added)
    (_, *blocks), tiles = _tiles(values, len(weight), experts, prefix)
    kernels.gated_mix[(_row_blocks(len(values), prefix, _ROWS), *blocks)](
        *(weight, *weight.stride()[:2], bias, bias.stride(0)),
        *(*strided(values), *strided(u1), *strided(third)),
        *(weight if experts is None else experts, weight if scales is None else scales),
        *(out, *strided(mixed)),
        **tiles,
        HAS_ADDED=added is not None,
    )
    return out, mixed


def gradients_of_gate(
    gradient: Tensor,
    u1: Tensor,
    mixed: Tensor,
    bias: Tensor,
    experts: Tensor | None,
    scales: Tensor | None,
    prefix: int,
    of_u1: Tensor,
) -> tuple[Tensor, Tensor]:
    """dg, and dc, which is empty where nothing is routed; du1 is written into of_u1."""
    from megatron_smlp.ops.kernels import gated_mix as kernels

    tokens, batch, features = mixed.shape
    heads = len(bias) if experts is None else experts.shape[-1]
    of_mixed = mixed.new_empty(mixed.shape)
    blocks = -(-features // heads // _GATE_COLUMNS)
    shape = (0,) if scales is None else (tokens, batch, heads, blocks)
    parts = mixed.new_empty(shape, dtype=torch.float32)
    if mixed.numel():
        gradient, u1, bias = rows_ready(gradient), rows_ready(u1), rows_ready(bias)
        kernels.gradients_of_gate[(-(-tokens * batch // _GATE_ROWS), blocks, heads)](
            *(*strided(gradient), *strided(u1), mixed, bias, bias.stride(0)),
            *(mixed if experts is None else experts, mixed if scales is None else scales),
            *(of_mixed, *strided(of_u1), parts),
            LINES=tokens * batch,
            BATCH=batch,
            PREFIX=prefix,
            WIDTH=features // heads,
            ROUTED=experts is not None,
            ROWS=_GATE_ROWS,
            COLUMNS=_GATE_COLUMNS,
            num_warps=_NUM_WARPS // 2,
            **FUSED,
        )
    return of_mixed, parts if scales is None else parts[prefix:].sum(dim=(0, 3))


def gradients_of_values(
    upstream: Tensor, weight: Tensor, experts: Tensor | None, scales: Tensor | None, prefix: int
) -> Tensor:
    """dv. upstream: dg, contiguous."""
    from megatron_smlp.ops.kernels import gated_mix as kernels

    of_values = upstream.new_empty(upstream.shape)
    if upstream.numel() == 0:
        return of_values
    weight = rows_ready(weight)
    grid, tiles = _tiles(upstream, len(weight), experts, prefix)
    kernels.gradients_of_values[grid](
        *(weight, *weight.stride()[:2], *strided(upstream)),
        *(weight if experts is None else experts, weight if scales is None else scales),
        of_values,
        **tiles,
    )
    return of_values


def gradients_of_weights(
    upstream: Tensor,
    values: Tensor,
    bias: Tensor,
    weight_dtype: torch.dtype,
    experts: Tensor | None,
    scales: Tensor | None,
    prefix: int,
) -> tuple[Tensor, Tensor]:
    """dM and db."""
    from megatron_smlp.ops.kernels import gated_mix as kernels

    matrices, tokens = bias.shape
    of_weight = bias.new_empty((matrices, tokens, tokens), dtype=weight_dtype)
    of_bias = bias.new_empty(matrices, tokens)
    if values.numel() == 0:
        return of_weight.zero_(), of_bias.zero_()
    values = rows_ready(values)
    (*_, heads), tiles = _tiles(values, matrices, experts, prefix)
    del tiles["COLUMNS"]
    pairs, ends = (values, values) if experts is None else _pairs_of_each(experts, matrices)
    blocks = _row_blocks(tokens, prefix, _WEIGHT_ROWS), -(-tokens // _WEIGHT_ROWS)
    kernels.gradients_of_weights[(*blocks, matrices)](
        *(*strided(upstream), *strided(values), pairs, ends),
        *(values if scales is None else scales, of_weight, of_bias),
        HEADS=heads,
        **tiles | {"ROWS": _WEIGHT_ROWS, "num_warps": _NUM_WARPS // 2},
    )
    return of_weight, of_bias


def _pairs_of_each(experts: Tensor, matrices: int) -> tuple[Tensor, Tensor]:
    """Pairs of sample and head in the order of their experts, and where each expert's end.

    experts: <int32>[2, B, H]. Returns <int32>[2, B H] and <int32>[2, E]: nobody waits for sizes.
    """
    chosen, pairs = experts.flatten(1).sort(dim=1, stable=True)
    numbers = torch.arange(matrices, dtype=chosen.dtype, device=chosen.device)
    ends = torch.searchsorted(chosen, numbers.expand(2, -1).contiguous(), right=True)
    return pairs.int(), ends.int()
