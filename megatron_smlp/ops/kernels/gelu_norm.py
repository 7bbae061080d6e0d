"""The kernels of GELU and LayerNorm by head; ../gelu_norm.py has the formulas and calls them.

Letters: H heads, f = WIDTH features of a head, LINES = T B pairs of token and sample. A program
holds ROWS lines of one head at once, all of their features: BLOCK is a power of two, at least f.
"""

# Parameters of kernels have no types but constexpr: Triton derives them from each call.
import triton
import triton.language as tl

from megatron_smlp.ops.kernels.gelu import gelu, gelu_and_slope


@triton.jit
def _places(lines, features, head, token_stride, sample_stride, BATCH, WIDTH: tl.constexpr):
    """Return offsets [lines, features] of a head's features."""
    tokens, samples = (lines // BATCH).to(tl.int64), (lines % BATCH).to(tl.int64)
    at = tokens * token_stride + samples * sample_stride
    return at[:, None] + head * WIDTH + features[None, :]


@triton.jit
def normed_gelu(
    inputs,
    inputs_token,
    inputs_sample,
    weight,
    bias,
    values,
    means,
    scales,
    LINES,
    BATCH,
    EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Program (i, h): lines i of v = LN(GELU(u2)) of head h, their means, and 1 / deviations.

    values: [T, B, H f], means, scales: <fp32>[T, B, H], contiguous.
    """
    head, heads = tl.program_id(1), tl.num_programs(1)
    lines, features = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    real = lines < LINES
    here = real[:, None] & (features[None, :] < WIDTH)
    at = _places(lines, features, head, inputs_token, inputs_sample, BATCH, WIDTH)
    active = gelu(tl.load(inputs + at, mask=here, other=0.0).to(tl.float32))
    mean = tl.sum(active, axis=1) / WIDTH
    centred = tl.where(here, active - mean[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, axis=1) / WIDTH + EPS)
    at = head * WIDTH + features
    factor = tl.load(weight + at, mask=features < WIDTH, other=0.0).to(tl.float32)
    shift = tl.load(bias + at, mask=features < WIDTH, other=0.0).to(tl.float32)
    normed = centred * scale[:, None] * factor[None, :] + shift[None, :]
    at = lines[:, None].to(tl.int64) * (heads * WIDTH) + head * WIDTH + features[None, :]
    tl.store(values + at, normed.to(values.dtype.element_ty), mask=here)
    tl.store(means + lines * heads + head, mean, mask=real)
    tl.store(scales + lines * heads + head, scale, mask=real)


@triton.jit
def gradients(
    gradient,
    of_means,
    inputs,
    inputs_token,
    inputs_sample,
    weight,
    means,
    scales,
    of_inputs,
    outputs_token,
    outputs_sample,
    of_norm_weight,
    of_norm_bias,
    LINES,
    BATCH,
    HAS_MEANS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Program (i, h): du2 of every n-th block of lines, n programs, and their part of dw and db.

    gradient: dv, [T, B, H f], contiguous; of_means: dm, laid out as the means; of_inputs: du2;
    of_norm_weight, of_norm_bias: <fp32>[n, H f].
    """
    program, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    features = tl.arange(0, BLOCK)
    factor = tl.load(weight + head * WIDTH + features, mask=features < WIDTH, other=0.0).to(
        tl.float32
    )
    weight_part, bias_part = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for block in range(program, tl.cdiv(LINES, ROWS), tl.num_programs(0)):
        lines = block * ROWS + tl.arange(0, ROWS)
        real = lines < LINES
        here = real[:, None] & (features[None, :] < WIDTH)
        at = _places(lines, features, head, inputs_token, inputs_sample, BATCH, WIDTH)
        active, slope = gelu_and_slope(tl.load(inputs + at, mask=here, other=0.0).to(tl.float32))
        mean = tl.load(means + lines * heads + head, mask=real, other=0.0)
        scale = tl.load(scales + lines * heads + head, mask=real, other=0.0)
        normed = tl.where(here, (active - mean[:, None]) * scale[:, None], 0.0)
        at = lines[:, None].to(tl.int64) * (heads * WIDTH) + head * WIDTH + features[None, :]
        given = tl.load(gradient + at, mask=here, other=0.0).to(tl.float32)
        weight_part += tl.sum(given * normed, axis=0)
        bias_part += tl.sum(given, axis=0)
        given = given * factor[None, :]
        along, constant = tl.sum(given * normed, axis=1) / WIDTH, tl.sum(given, axis=1) / WIDTH
        answer = (given - constant[:, None] - normed * along[:, None]) * scale[:, None]
        if HAS_MEANS:
            direct = tl.load(of_means + lines * heads + head, mask=real, other=0.0)
            answer += direct[:, None] / WIDTH
        at = _places(lines, features, head, outputs_token, outputs_sample, BATCH, WIDTH)
        tl.store(of_inputs + at, (answer * slope).to(of_inputs.dtype.element_ty), mask=here)
    at = program.to(tl.int64) * (heads * WIDTH) + head * WIDTH + features
    tl.store(of_norm_weight + at, weight_part, mask=features < WIDTH)
    tl.store(of_norm_bias + at, bias_part, mask=features < WIDTH)
