"""The kernels of causal gating; formulas: ../gated_mix.py; launches: ../gated_mix_launches.py.

Tiles of M above the diagonal are never read; the program with the longest row starts first. Sums
have a fixed order, so that results are bitwise reproducible.

Letters: T tokens, B samples, H heads, f = WIDTH features of a head, N = B f columns of a head.
Token t, sample b and feature j of head h are at t * token_stride + b * sample_stride + h * f + j of
each tensor. ROUTED: a head of a sample mixes by the M of one expert up to token PREFIX and of
another, with its own scale, from there on: experts is [2, B, H], scales [B, H]. A block of rows
then lies on one side of PREFIX, and a block of columns in one sample.
"""

# Parameters of kernels have no types but constexpr: Triton derives them from each call.
import triton
import triton.language as tl

from megatron_smlp.ops.kernels.gelu import gelu, gelu_and_slope


@triton.jit
def _places(tokens, columns, head, token_stride, sample_stride, WIDTH: tl.constexpr):
    """Return offsets [tokens, columns] of a head's columns."""
    at = (columns // WIDTH).to(tl.int64) * sample_stride + head * WIDTH + columns % WIDTH
    return tokens[:, None].to(tl.int64) * token_stride + at[None, :]


@triton.jit
def _row_block(block, T, PREFIX, ROUTED: tl.constexpr, ROWS: tl.constexpr):
    """Return a block's first row, the end of its rows, and whether it lies after the prefix."""
    if ROUTED:
        before = tl.cdiv(PREFIX, ROWS)
        behind = (block >= before).to(tl.int32)
        first = block * ROWS + behind * (PREFIX - before * ROWS)
        limit = PREFIX + behind * (T - PREFIX)
    else:
        behind, first, limit = 0, block * ROWS, T
    return first, tl.minimum(first + ROWS, limit), behind


@triton.jit
def _column_block(block, N, WIDTH: tl.constexpr, ROUTED: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the columns of a block, which of them exist, and the first one's sample."""
    if ROUTED:
        of_sample: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
        features = block % of_sample * COLUMNS + tl.arange(0, COLUMNS)
        sample, real = block // of_sample, features < WIDTH
        columns = sample * WIDTH + features
    else:
        columns = block * COLUMNS + tl.arange(0, COLUMNS)
        sample, real = 0, columns < N
    return columns, real, sample


@triton.jit
def gated_mix(
    weight, head_stride, row_stride, bias, bias_stride,
    values, values_token, values_sample, gate, gate_token, gate_sample,
    added, added_token, added_sample, experts, scales,
    out, mixed, out_token, out_sample,
    T, N, PREFIX, WIDTH: tl.constexpr, HAS_ADDED: tl.constexpr,
    ROUTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """Program (i, j, h): rows i and columns j of head h of y = GELU(u1) g and of `mixed`.

    mixed is g = tri(M) v + b + added; with ROUTED, where g = s tri(M) v + b, the product alone.
    """
    block, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(2)
    first, end, behind = _row_block(block, T, PREFIX, ROUTED, ROWS)
    columns, real, sample = _column_block(tl.program_id(1), N, WIDTH, ROUTED, COLUMNS)
    matrix = head
    if ROUTED:
        pair = sample * tl.num_programs(2) + head
        matrix = tl.load(experts + behind * (N // WIDTH) * tl.num_programs(2) + pair)
    rows = first + tl.arange(0, ROWS)
    line = weight + matrix.to(tl.int64) * head_stride + rows[:, None].to(tl.int64) * row_stride
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    below = first // DEPTH * DEPTH
    for start in range(0, below, DEPTH):
        before = start + tl.arange(0, DEPTH)
        part = tl.load(line + before[None, :], mask=rows[:, None] < end, other=0.0)
        at = _places(before, columns, head, values_token, values_sample, WIDTH)
        value = tl.load(values + at, mask=real[None, :], other=0.0)
        total = tl.dot(part.to(value.dtype), value, total, input_precision="ieee")
    for start in range(below, end, DEPTH):
        before = start + tl.arange(0, DEPTH)
        # Not up to `end`: a mask that 16 does not divide would be loaded element by element.
        inside = (rows[:, None] < end) & (before[None, :] < T)
        part = tl.load(line + before[None, :], mask=inside, other=0.0)
        part = tl.where(before[None, :] <= rows[:, None], part, 0.0)
        at = _places(before, columns, head, values_token, values_sample, WIDTH)
        value = tl.load(values + at, mask=(before[:, None] < end) & real[None, :], other=0.0)
        total = tl.dot(part.to(value.dtype), value, total, input_precision="ieee")
    here = (rows[:, None] < end) & real[None, :]
    kept = mixed + _places(rows, columns, head, out_token, out_sample, WIDTH)
    if ROUTED:
        tl.store(kept, total.to(mixed.dtype.element_ty), mask=here)
        total = total * tl.load(scales + pair, mask=behind > 0, other=1.0)
    shift = tl.load(bias + matrix * bias_stride + rows, mask=rows < end, other=0.0)
    total += shift.to(tl.float32)[:, None]
    if HAS_ADDED:
        at = _places(rows, columns, head, added_token, added_sample, WIDTH)
        total += tl.load(added + at, mask=here, other=0.0).to(tl.float32)
    if not ROUTED:
        tl.store(kept, total.to(mixed.dtype.element_ty), mask=here)
    at = _places(rows, columns, head, gate_token, gate_sample, WIDTH)
    factor = gelu(tl.load(gate + at, mask=here, other=0.0).to(tl.float32))
    at = _places(rows, columns, head, out_token, out_sample, WIDTH)
    tl.store(out + at, (total * factor).to(out.dtype.element_ty), mask=here)


@triton.jit
def gradients_of_gate(
    gradient,
    gradient_token,
    gradient_sample,
    gate,
    gate_token,
    gate_sample,
    mixed,
    bias,
    bias_stride,
    experts,
    scales,
    of_mixed,
    of_gate,
    outputs_token,
    outputs_sample,
    shifts,
    of_scales,
    LINES,
    BATCH,
    PREFIX,
    WIDTH: tl.constexpr,
    ROUTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Program (i, j, h): dg = dy GELU(u1) and du1 = dy g GELU'(u1) of lines i and features j.

    A line is a token of a sample. mixed, of_mixed: [T, B, H f], contiguous; of_gate: du1.
    shifts: <fp32>[H, T, B, j], sums of dg over features j.
    of_scales: <fp32>[T, B, H, j], with ROUTED: sums of dg times the product.
    """
    head, heads = tl.program_id(2), tl.num_programs(2)
    lines = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    features = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here = (lines[:, None] < LINES) & (features[None, :] < WIDTH)
    tokens = (lines // BATCH).to(tl.int64)[:, None]
    samples = (lines % BATCH).to(tl.int64)[:, None]
    at = head * WIDTH + features[None, :]
    place = tokens * gradient_token + samples * gradient_sample + at
    given = tl.load(gradient + place, mask=here, other=0.0).to(tl.float32)
    place = tokens * gate_token + samples * gate_sample + at
    value, slope = gelu_and_slope(tl.load(gate + place, mask=here, other=0.0).to(tl.float32))
    place = lines[:, None].to(tl.int64) * (heads * WIDTH) + at
    factor = tl.load(mixed + place, mask=here, other=0.0).to(tl.float32)
    upstream = given * value
    tl.store(of_mixed + place, upstream.to(of_mixed.dtype.element_ty), mask=here)
    at_shift = (head.to(tl.int64) * LINES + lines) * tl.num_programs(1) + tl.program_id(1)
    tl.store(shifts + at_shift, tl.sum(upstream, axis=1), mask=lines < LINES)
    if ROUTED:
        part = lines.to(tl.int64) * heads + head
        at_part = of_scales + part * tl.num_programs(1) + tl.program_id(1)
        tl.store(at_part, tl.sum(upstream * factor, axis=1), mask=lines < LINES)
        behind = lines // BATCH >= PREFIX
        pairs = lines % BATCH * heads + head
        choice = behind.to(tl.int32) * BATCH * heads + pairs
        matrix = tl.load(experts + choice, mask=lines < LINES, other=0)
        scale = tl.load(scales + pairs, mask=behind, other=1.0)
        shift = bias + matrix * bias_stride + lines // BATCH
        shift = tl.load(shift, mask=lines < LINES, other=0.0).to(tl.float32)
        factor = factor * scale[:, None] + shift[:, None]
    place = tokens * outputs_token + samples * outputs_sample + at
    of_product = given * factor * slope
    tl.store(of_gate + place, of_product.to(of_gate.dtype.element_ty), mask=here)


@triton.jit
def _upper_product(
    total,
    column,
    row_stride,
    rows,
    begin,
    inner,
    end,
    T,
    upstream,
    columns,
    real,
    head,
    token_stride,
    sample_stride,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Return total + sum of M[t, s] dg[t] over begin <= t < end, t >= s: all s if t >= inner."""
    for start in range(begin, inner, DEPTH):
        after = start + tl.arange(0, DEPTH)
        inside = (after[:, None] < inner) & (rows[None, :] < T)
        part = tl.load(column + after[:, None].to(tl.int64) * row_stride, mask=inside, other=0.0)
        part = tl.where(rows[None, :] <= after[:, None], part, 0.0)
        at = _places(after, columns, head, token_stride, sample_stride, WIDTH)
        given = tl.load(upstream + at, mask=(after[:, None] < inner) & real[None, :], other=0.0)
        total = tl.dot(tl.trans(part.to(given.dtype)), given, total, input_precision="ieee")
    for start in range(inner, end, DEPTH):
        after = start + tl.arange(0, DEPTH)
        inside = (after[:, None] < end) & (rows[None, :] < T)
        part = tl.load(column + after[:, None].to(tl.int64) * row_stride, mask=inside, other=0.0)
        at = _places(after, columns, head, token_stride, sample_stride, WIDTH)
        given = tl.load(upstream + at, mask=(after[:, None] < end) & real[None, :], other=0.0)
        total = tl.dot(tl.trans(part.to(given.dtype)), given, total, input_precision="ieee")
    return total


@triton.jit
def gradients_of_values(
    weight,
    head_stride,
    row_stride,
    upstream,
    upstream_token,
    upstream_sample,
    experts,
    scales,
    of_values,
    T,
    N,
    PREFIX,
    WIDTH: tl.constexpr,
    ROUTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Program (i, j, h): rows i and columns j of head h of dv = tri(M)' dg.

    upstream: dg, and of_values: dv, with the same strides.
    """
    head, first = tl.program_id(2), tl.program_id(0) * ROWS
    columns, real, sample = _column_block(tl.program_id(1), N, WIDTH, ROUTED, COLUMNS)
    rows = first + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    inner = tl.minimum(first + ROWS, T)
    if ROUTED:
        pair = sample * tl.num_programs(2) + head
        if T > PREFIX:
            expert = tl.load(experts + (N // WIDTH) * tl.num_programs(2) + pair)
            matrix = weight + expert.to(tl.int64) * head_stride
            begin = tl.maximum(first, PREFIX)
            total = _upper_product(
                *(total, matrix + rows[None, :], row_stride, rows),
                *(begin, tl.maximum(begin, inner), T, T, upstream, columns, real, head),
                *(upstream_token, upstream_sample, WIDTH, DEPTH),
            )
            total = total * tl.load(scales + pair)
        matrix = weight + tl.load(experts + pair).to(tl.int64) * head_stride
        total = _upper_product(
            *(total, matrix + rows[None, :], row_stride, rows),
            *(first, tl.minimum(inner, PREFIX), PREFIX, T, upstream, columns, real, head),
            *(upstream_token, upstream_sample, WIDTH, DEPTH),
        )
    else:
        matrix = weight + head.to(tl.int64) * head_stride
        total = _upper_product(
            *(total, matrix + rows[None, :], row_stride, rows, first, inner, T, T),
            *(upstream, columns, real, head, upstream_token, upstream_sample, WIDTH, DEPTH),
        )
    here = (rows[:, None] < T) & real[None, :]
    at = _places(rows, columns, head, upstream_token, upstream_sample, WIDTH)
    tl.store(of_values + at, total.to(of_values.dtype.element_ty), mask=here)


@triton.jit
def _weights_part(
    total,
    rows,
    end,
    before,
    columns,
    real,
    head,
    T,
    upstream,
    upstream_token,
    upstream_sample,
    values,
    values_token,
    values_sample,
    WIDTH: tl.constexpr,
):
    """Return total + dg v' over some columns."""
    at = _places(rows, columns, head, upstream_token, upstream_sample, WIDTH)
    given = tl.load(upstream + at, mask=(rows[:, None] < end) & real[None, :], other=0.0)
    at = _places(before, columns, head, values_token, values_sample, WIDTH)
    value = tl.load(values + at, mask=(before[:, None] < T) & real[None, :], other=0.0)
    return tl.dot(given, tl.trans(value), total, input_precision="ieee")


@triton.jit
def _line_sums(total, line, begin, end, inside, DEPTH: tl.constexpr):
    """Return total + the sum of each line from begin to end."""
    for start in range(begin, end, DEPTH):
        places = start + tl.arange(0, DEPTH)
        here = inside[:, None] & (places[None, :] < end)
        total += tl.sum(tl.load(line[:, None] + places[None, :], mask=here, other=0.0), axis=1)
    return total


@triton.jit
def gradients_of_weights(
    upstream, upstream_token, upstream_sample, values, values_token, values_sample,
    pairs, ends, scales, shifts, of_weight, of_bias,
    T, N, PREFIX, HEADS, BLOCKS, PARTS, WIDTH: tl.constexpr,
    ROUTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Program (i, j, e PARTS + p): rows i, columns j of part p of dM_e = tril(dg v'), and db_e.

    A part sums a share of dg's and v's columns. of_weight: [PARTS, E, T, T], contiguous; with more
    than one part, no tile above the diagonal is written. of_bias: [E, T], by j = p = 0, from
    shifts, <fp32>[H, T, B, BLOCKS]. A matrix belongs to a head or, with ROUTED, to the pairs of
    sample and head that pairs, <int32>[2, B H], lists up to ends, <int32>[2, E].
    """
    block, other = tl.program_id(0), tl.program_id(1)
    matrix, part = tl.program_id(2) // PARTS, tl.program_id(2) % PARTS
    matrices = tl.num_programs(2) // PARTS
    first, end, behind = _row_block(block, T, PREFIX, ROUTED, ROWS)
    rows, before = first + tl.arange(0, ROWS), other * COLUMNS + tl.arange(0, COLUMNS)
    of_all = behind * (N // WIDTH) * HEADS
    if ROUTED:
        place = behind * matrices + matrix
        begin = tl.load(ends + place - 1, mask=matrix > 0, other=0)
        last = tl.load(ends + place)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    if other * COLUMNS < end:
        if ROUTED:
            share = tl.cdiv(last - begin, PARTS)
            ahead = begin + part * share
            for number in range(ahead, tl.minimum(ahead + share, last)):
                pair = tl.load(pairs + of_all + number)
                product = tl.zeros([ROWS, COLUMNS], tl.float32)
                for start in range(0, WIDTH, DEPTH):
                    features = start + tl.arange(0, DEPTH)
                    columns = pair // HEADS * WIDTH + features
                    product = _weights_part(
                        *(product, rows, end, before, columns, features < WIDTH, pair % HEADS, T),
                        *(upstream, upstream_token, upstream_sample),
                        *(values, values_token, values_sample, WIDTH),
                    )
                total += product * tl.load(scales + pair, mask=behind > 0, other=1.0)
        else:
            share = tl.cdiv(tl.cdiv(N, DEPTH), PARTS) * DEPTH
            for start in range(part * share, tl.minimum((part + 1) * share, N), DEPTH):
                columns = start + tl.arange(0, DEPTH)
                total = _weights_part(
                    *(total, rows, end, before, columns, columns < N, matrix, T),
                    *(upstream, upstream_token, upstream_sample),
                    *(values, values_token, values_sample, WIDTH),
                )
        total = tl.where(before[None, :] <= rows[:, None], total, 0.0)
    here = (rows[:, None] < end) & (before[None, :] < tl.where(PARTS == 1, T, end))
    target = of_weight + (part * matrices + matrix).to(tl.int64) * T * T
    target += rows[:, None].to(tl.int64) * T + before[None, :]
    tl.store(target, total.to(of_weight.dtype.element_ty), mask=here)
    if (other == 0) & (part == 0):
        shift = tl.zeros([ROWS], tl.float32)
        size = N // WIDTH * BLOCKS
        if ROUTED:
            for number in range(begin, last):
                pair = tl.load(pairs + of_all + number)
                line = shifts + ((pair % HEADS).to(tl.int64) * T + rows) * size
                at = pair // HEADS * BLOCKS
                shift = _line_sums(shift, line, at, at + BLOCKS, rows < end, DEPTH)
        else:
            line = shifts + (matrix.to(tl.int64) * T + rows) * size
            shift = _line_sums(shift, line, 0, size, rows < end, DEPTH)
        at_bias = of_bias + matrix * T + rows
        tl.store(at_bias, shift.to(of_bias.dtype.element_ty), mask=rows < end)


@triton.jit
def sums_of_parts(parts, of_weight, T, LINES, PARTS, COLUMNS: tl.constexpr):
    """Program (i, j): columns j of line i of dM, [E T, T], summed over parts, [PARTS, E T, T].

    LINES: E T. Parts are summed in order; what is above the diagonal is not read, and zero.
    """
    line = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float32)
    for part in range(PARTS):
        at = (part * LINES + line).to(tl.int64) * T + columns
        total += tl.load(parts + at, mask=columns <= line % T, other=0.0)
    at = line.to(tl.int64) * T + columns
    tl.store(of_weight + at, total.to(of_weight.dtype.element_ty), mask=columns < T)
