"""The kernels of causal gating; ../gated_mix.py has the formulas and calls them.

Tiles of M above the diagonal are never read; the program with the longest row starts first. A sum
has one order, so that a result has the same bits each time.

Letters: T tokens, H heads, f = WIDTH features of a head, N = B f columns of a head. Token t, sample
b and feature j of head h are at t * token_stride + b * sample_stride + h * f + j of each tensor.
"""

# Parameters of kernels have no types but constexpr: Triton derives them from each call.
import triton
import triton.language as tl


@triton.jit
def _places(tokens, columns, head, token_stride, sample_stride, WIDTH: tl.constexpr):
    """Offsets [tokens, columns] of a head's columns."""
    at = (columns // WIDTH).to(tl.int64) * sample_stride + head * WIDTH + columns % WIDTH
    return tokens[:, None].to(tl.int64) * token_stride + at[None, :]


@triton.jit
def gated_mix(
    weight,
    head_stride,
    row_stride,
    bias,
    bias_stride,
    values,
    values_token,
    values_sample,
    gate,
    gate_token,
    gate_sample,
    added,
    added_token,
    added_sample,
    out,
    mixed,
    out_token,
    out_sample,
    T,
    N,
    WIDTH: tl.constexpr,
    HAS_ADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Program (i, j, h): rows i and columns j of head h of g = tri(M) v + b + added and u1 * g."""
    block, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(2)
    rows = block * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    matrix = weight + head * head_stride + rows[:, None].to(tl.int64) * row_stride
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, block * ROWS, DEPTH):
        before = start + tl.arange(0, DEPTH)
        part = tl.load(matrix + before[None, :], mask=rows[:, None] < T, other=0.0)
        at = _places(before, columns, head, values_token, values_sample, WIDTH)
        value = tl.load(values + at, mask=columns[None, :] < N, other=0.0)
        total = tl.dot(part.to(value.dtype), value, total, input_precision="ieee")
    for start in range(block * ROWS, tl.minimum(block * ROWS + ROWS, T), DEPTH):
        before = start + tl.arange(0, DEPTH)
        inside = (rows[:, None] < T) & (before[None, :] < T)
        part = tl.load(matrix + before[None, :], mask=inside, other=0.0)
        part = tl.where(before[None, :] <= rows[:, None], part, 0.0)
        at = _places(before, columns, head, values_token, values_sample, WIDTH)
        inside = (before[:, None] < T) & (columns[None, :] < N)
        value = tl.load(values + at, mask=inside, other=0.0)
        total = tl.dot(part.to(value.dtype), value, total, input_precision="ieee")
    shift = tl.load(bias + head * bias_stride + rows, mask=rows < T, other=0.0)
    total += shift.to(tl.float32)[:, None]
    here = (rows[:, None] < T) & (columns[None, :] < N)
    if HAS_ADDED:
        at = _places(rows, columns, head, added_token, added_sample, WIDTH)
        total += tl.load(added + at, mask=here, other=0.0).to(tl.float32)
    at = _places(rows, columns, head, gate_token, gate_sample, WIDTH)
    factor = tl.load(gate + at, mask=here, other=0.0).to(tl.float32)
    at = _places(rows, columns, head, out_token, out_sample, WIDTH)
    tl.store(mixed + at, total.to(mixed.dtype.element_ty), mask=here)
    tl.store(out + at, (total * factor).to(out.dtype.element_ty), mask=here)


@triton.jit
def _gradient_of_mixed(
    gradient,
    gradient_token,
    gradient_sample,
    gate,
    gate_token,
    gate_sample,
    tokens,
    columns,
    head,
    inside,
    WIDTH: tl.constexpr,
):
    """dg = dy * u1: <fp32>[tokens, columns]."""
    at = _places(tokens, columns, head, gradient_token, gradient_sample, WIDTH)
    upstream = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
    at = _places(tokens, columns, head, gate_token, gate_sample, WIDTH)
    return upstream * tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def gradients_of_operands(
    weight,
    head_stride,
    row_stride,
    gradient,
    gradient_token,
    gradient_sample,
    gate,
    gate_token,
    gate_sample,
    mixed,
    of_values,
    of_gate,
    of_added,
    out_token,
    out_sample,
    T,
    N,
    WIDTH: tl.constexpr,
    HAS_ADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Program (i, j, h): rows i and columns j of head h of dv = tri(M)' dg, du1 = dy * g and dg."""
    block, head = tl.program_id(0), tl.program_id(2)
    rows = block * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    matrix = weight + head * head_stride + rows[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    kind = of_values.dtype.element_ty
    for start in range(block * ROWS, tl.minimum(block * ROWS + ROWS, T), DEPTH):
        after = start + tl.arange(0, DEPTH)
        inside = (after[:, None] < T) & (rows[None, :] < T)
        part = tl.load(matrix + after[:, None].to(tl.int64) * row_stride, mask=inside, other=0.0)
        part = tl.where(rows[None, :] <= after[:, None], part, 0.0)
        inside = (after[:, None] < T) & (columns[None, :] < N)
        upstream = _gradient_of_mixed(
            *(gradient, gradient_token, gradient_sample, gate, gate_token, gate_sample),
            *(after, columns, head, inside, WIDTH),
        )
        total = tl.dot(tl.trans(part.to(kind)), upstream.to(kind), total, input_precision="ieee")
    for start in range(block * ROWS + ROWS, T, DEPTH):
        after = start + tl.arange(0, DEPTH)
        inside = after[:, None] < T
        part = tl.load(matrix + after[:, None].to(tl.int64) * row_stride, mask=inside, other=0.0)
        inside = inside & (columns[None, :] < N)
        upstream = _gradient_of_mixed(
            *(gradient, gradient_token, gradient_sample, gate, gate_token, gate_sample),
            *(after, columns, head, inside, WIDTH),
        )
        total = tl.dot(tl.trans(part.to(kind)), upstream.to(kind), total, input_precision="ieee")
    here = (rows[:, None] < T) & (columns[None, :] < N)
    at = _places(rows, columns, head, out_token, out_sample, WIDTH)
    tl.store(of_values + at, total.to(kind), mask=here)
    given = tl.load(
        gradient + _places(rows, columns, head, gradient_token, gradient_sample, WIDTH),
        mask=here,
        other=0.0,
    ).to(tl.float32)
    of_product = given * tl.load(mixed + at, mask=here, other=0.0).to(tl.float32)
    tl.store(of_gate + at, of_product.to(kind), mask=here)
    if HAS_ADDED:
        upstream = _gradient_of_mixed(
            *(gradient, gradient_token, gradient_sample, gate, gate_token, gate_sample),
            *(rows, columns, head, here, WIDTH),
        )
        tl.store(of_added + at, upstream.to(kind), mask=here)


@triton.jit
def gradients_of_weights(
    gradient,
    gradient_token,
    gradient_sample,
    gate,
    gate_token,
    gate_sample,
    values,
    values_token,
    values_sample,
    of_weight,
    of_bias,
    T,
    N,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Program (i, j, h): rows i, columns j of dM_h = tril(dg v'); db, sums of dg's rows, for j = 0.

    of_weight: [H, T, T], contiguous; of_bias: [H, T].
    """
    block, other, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = block * ROWS + tl.arange(0, ROWS)
    before = other * ROWS + tl.arange(0, ROWS)
    target = (
        of_weight + head.to(tl.int64) * T * T + rows[:, None].to(tl.int64) * T + before[None, :]
    )
    here = (rows[:, None] < T) & (before[None, :] < T)
    total = tl.zeros([ROWS, ROWS], tl.float32)
    if other <= block:
        shift = tl.zeros([ROWS], tl.float32)
        for start in range(0, N, DEPTH):
            columns = start + tl.arange(0, DEPTH)
            inside = (rows[:, None] < T) & (columns[None, :] < N)
            upstream = _gradient_of_mixed(
                *(gradient, gradient_token, gradient_sample, gate, gate_token, gate_sample),
                *(rows, columns, head, inside, WIDTH),
            )
            at = _places(before, columns, head, values_token, values_sample, WIDTH)
            inside = (before[:, None] < T) & (columns[None, :] < N)
            value = tl.load(values + at, mask=inside, other=0.0)
            left, right = upstream.to(value.dtype), tl.trans(value)
            total = tl.dot(left, right, total, input_precision="ieee")
            shift += tl.sum(upstream, axis=1)
        total = tl.where(before[None, :] <= rows[:, None], total, 0.0)
        if other == 0:
            answer = shift.to(of_bias.dtype.element_ty)
            tl.store(of_bias + head * T + rows, answer, mask=rows < T)
    tl.store(target, total.to(of_weight.dtype.element_ty), mask=here)
