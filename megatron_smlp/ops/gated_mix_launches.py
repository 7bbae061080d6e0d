"""Launches the kernels of the causal gate: grids and output memory; tiles.py has the tiles.

Formulas and letters are at the top of gated_mix.py, whose autograd functions call these.
"""

import torch
from torch import Tensor

from megatron_smlp.ops import tiles
from megatron_smlp.ops.tiles import Tile
from megatron_smlp.ops.triton_ready import FUSED, rows_ready, strided

_GATE_ROWS, _GATE_COLUMNS, _GATE_WARPS = 32, 128, 4  # of a tile of dg and du1
_SUM_COLUMNS = 1024  # of a line of dM
LEAST_COLUMNS = 1024
"""Fewest columns of a part of dM's sums, which then reads eight times what it writes."""


def _sizes(
    values: Tensor, matrices: int, experts: Tensor | None, prefix: int, tile: Tile
) -> dict[str, int]:
    """Return the arguments that all products share."""
    tokens, batch, features = values.shape
    width = features // (matrices if experts is None else experts.shape[-1])
    sizes = {"T": tokens, "N": batch * width, "PREFIX": prefix, "WIDTH": width}
    sizes |= {"ROUTED": experts is not None, "ROWS": tile.rows, "COLUMNS": tile.columns}
    return sizes | {"DEPTH": tile.depth, "num_warps": tile.warps, "num_stages": tile.stages} | FUSED


def _fitting(weight: Tensor, values: Tensor, tile: Tile) -> Tile:
    is_wide = weight.element_size() > values.element_size()
    return tiles.for_wide_weights(tile) if is_wide else tile


def _tiles(
    values: Tensor, matrices: int, experts: Tensor | None, prefix: int, tile: Tile
) -> tuple[tuple[int, int, int], dict[str, int]]:
    """Return the grid of g or dv, and the arguments that all products share."""
    sizes = _sizes(values, matrices, experts, prefix, tile)
    batch, width = values.shape[1], sizes["WIDTH"]
    blocks = -(-sizes["N"] // tile.columns)
    if experts is not None:  # each block of columns lies in one sample
        sizes["COLUMNS"] = min(tile.columns, max(16, 1 << (width - 1).bit_length()))
        blocks = batch * -(-width // sizes["COLUMNS"])
    return (-(-len(values) // tile.rows), blocks, values.shape[2] // width), sizes


def num_parts(tokens: int, matrices: int, columns: int, row: tiles.Tiles) -> int:
    """Return into how many parts the sums of dM are split: as many as fill the GPU.

    columns: of dg and v, per matrix, on average.
    """
    tile = row.weights
    ends = range(tile.rows, tokens + tile.rows, tile.rows)
    per_matrix = sum(-(-min(end, tokens) // tile.columns) for end in ends)
    return max(1, min(row.programs // (per_matrix * matrices), columns // LEAST_COLUMNS))


def _row_blocks(tokens: int, prefix: int, rows: int) -> int:
    """Count blocks of rows, of which none crosses the end of the prefix."""
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
    """Return y and what the backward needs: g, or if routed, the product alone."""
    from megatron_smlp.ops.kernels import gated_mix as kernels

    out, mixed = values.new_empty(values.shape), values.new_empty(values.shape)
    if values.numel() == 0:
        return out, mixed
    u1, values, weight, bias = (rows_ready(each) for each in (u1, values, weight, bias))
    third = u1 if added is None else rows_ready(added)
    tile = _fitting(weight, values, tiles.for_device(values.device).gate)
    (_, *blocks), sizes = _tiles(values, len(weight), experts, prefix, tile)
    kernels.gated_mix[(_row_blocks(len(values), prefix, tile.rows), *blocks)](
        *(weight, *weight.stride()[:2], bias, bias.stride(0)),
        *(*strided(values), *strided(u1), *strided(third)),
        *(weight if experts is None else experts, weight if scales is None else scales),
        *(out, *strided(mixed)),
        **sizes,
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dg; its sums over features, <fp32>[H, T, B, blocks of them]; and dc, which is empty if
    nothing is routed. Write du1 into of_u1."""
    from megatron_smlp.ops.kernels import gated_mix as kernels

    tokens, batch, features = mixed.shape
    heads = len(bias) if experts is None else experts.shape[-1]
    of_mixed = mixed.new_empty(mixed.shape)
    blocks = -(-features // heads // _GATE_COLUMNS)
    shape = (0,) if scales is None else (tokens, batch, heads, blocks)
    parts = mixed.new_empty(shape, dtype=torch.float32)
    shifts = mixed.new_empty((heads, tokens, batch, blocks), dtype=torch.float32)
    if mixed.numel():
        gradient, u1, bias = rows_ready(gradient), rows_ready(u1), rows_ready(bias)
        kernels.gradients_of_gate[(-(-tokens * batch // _GATE_ROWS), blocks, heads)](
            *(*strided(gradient), *strided(u1), mixed, bias, bias.stride(0)),
            *(mixed if experts is None else experts, mixed if scales is None else scales),
            *(of_mixed, *strided(of_u1), shifts, parts),
            LINES=tokens * batch,
            BATCH=batch,
            PREFIX=prefix,
            WIDTH=features // heads,
            ROUTED=experts is not None,
            ROWS=_GATE_ROWS,
            COLUMNS=_GATE_COLUMNS,
            num_warps=_GATE_WARPS,
            **FUSED,
        )
    return of_mixed, shifts, parts if scales is None else parts[prefix:].sum(dim=(0, 3))


def gradients_of_values(
    upstream: Tensor, weight: Tensor, experts: Tensor | None, scales: Tensor | None, prefix: int
) -> Tensor:
    """Return dv. upstream: dg, contiguous."""
    from megatron_smlp.ops.kernels import gated_mix as kernels

    of_values = upstream.new_empty(upstream.shape)
    if upstream.numel() == 0:
        return of_values
    weight = rows_ready(weight)
    tile = _fitting(weight, upstream, tiles.for_device(upstream.device).values)
    grid, sizes = _tiles(upstream, len(weight), experts, prefix, tile)
    kernels.gradients_of_values[grid](
        *(weight, *weight.stride()[:2], *strided(upstream)),
        *(weight if experts is None else experts, weight if scales is None else scales),
        of_values,
        **sizes,
    )
    return of_values


def gradients_of_weights(
    upstream: Tensor,
    values: Tensor,
    shifts: Tensor,
    bias: Tensor,
    weight_dtype: torch.dtype,
    experts: Tensor | None,
    scales: Tensor | None,
    prefix: int,
) -> tuple[Tensor, Tensor]:
    """Return dM and db. upstream: dg; shifts: its sums over features."""
    from megatron_smlp.ops.kernels import gated_mix as kernels

    matrices, tokens = bias.shape
    of_weight = bias.new_empty((matrices, tokens, tokens), dtype=weight_dtype)
    of_bias = bias.new_empty(matrices, tokens)
    if values.numel() == 0:
        return of_weight.zero_(), of_bias.zero_()
    values = rows_ready(values)
    row = tiles.for_device(values.device)
    sizes = _sizes(values, matrices, experts, prefix, row.weights)
    heads, columns = len(shifts), values[0].numel() // matrices
    parts, written = num_parts(tokens, matrices, columns, row), of_weight
    if parts > 1:
        written = of_weight.new_empty((parts, *of_weight.shape), dtype=torch.float32)
    pairs, ends = (values, values) if experts is None else _pairs_of_each(experts, matrices)
    blocks = _row_blocks(tokens, prefix, row.weights.rows), -(-tokens // row.weights.columns)
    kernels.gradients_of_weights[(*blocks, matrices * parts)](
        *(*strided(upstream), *strided(values), pairs, ends),
        *(values if scales is None else scales, shifts, written, of_bias),
        HEADS=heads,
        BLOCKS=shifts.shape[-1],
        PARTS=parts,
        **sizes,
    )
    if parts > 1:
        lines = matrices * tokens
        kernels.sums_of_parts[(lines, -(-tokens // _SUM_COLUMNS))](
            *(written, of_weight, tokens, lines, parts), COLUMNS=_SUM_COLUMNS, num_warps=4, **FUSED
        )
    return of_weight, of_bias


def _pairs_of_each(experts: Tensor, matrices: int) -> tuple[Tensor, Tensor]:
    """Return pairs of sample and head sorted by expert, and where each expert's pairs end.

    experts: <int32>[2, B, H]. Returns <int32>[2, B H] and <int32>[2, E]: the host never waits.
    """
    chosen, pairs = experts.flatten(1).sort(dim=1, stable=True)
    numbers = torch.arange(matrices, dtype=chosen.dtype, device=chosen.device)
    ends = torch.searchsorted(chosen, numbers.expand(2, -1).contiguous(), right=True)
    return pairs.int(), ends.int()
