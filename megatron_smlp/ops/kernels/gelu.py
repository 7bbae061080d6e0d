"""GELU inside a kernel, with erf, as torch computes it by default."""

import triton
import triton.language as tl

_ROOT_HALF = tl.constexpr(0.7071067811865476)
_DENSITY_AT_0 = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)


@triton.jit
def gelu(x):
    """x Phi(x): <fp32>, any shape."""
    return 0.5 * x * (1.0 + tl.erf(x * _ROOT_HALF))


@triton.jit
def gelu_and_slope(x):
    """GELU(x) and its derivative Phi(x) + x phi(x): <fp32>, the shape of x."""
    below = 0.5 * (1.0 + tl.erf(x * _ROOT_HALF))
    return x * below, below + x * _DENSITY_AT_0 * tl.exp(-0.5 * x * x)
