"""Time causal token mixing, forward and backward, against the two ways in which others do it.

`masked dense`: mask the [E, T, T] weight, then one batched matmul, in our own layout.
`g-mlp-pytorch`: the spatial gating unit of that package with `causal=True`, against the same unit
built on `causal_mix` (LayerNorm, mix, bias, gate product), same shapes and weights.

Both sides keep freed memory in the process, as in training (platform/allocator.py); if the system's
allocator returns it, both are slower, and the ratios are about the same.

Products in blocks wait for their slowest thread more often than one large product does: run it on a
quiet machine, or with --threads 1.
"""

import torch
import torch.nn.functional as F
from timing import Record, benchmark_parser, compare, report
from torch import Tensor

from megatron_smlp.ops.causal_mix import causal_mix
from megatron_smlp.platform.allocator import keep_freed_memory

# (heads E, tokens T, columns N)
DENSE_SHAPES = [(1, 512, 4096), (1, 1024, 2048), (1, 2048, 2048), (4, 1024, 1024), (8, 1024, 256)]
# (batch B, tokens T, hidden D, heads)
UNIT_SHAPES = [(4, 512, 1024, 1), (4, 1024, 1024, 1), (2, 2048, 1024, 1), (4, 1024, 1024, 4)]


def _bench_dense(shape: tuple[int, int, int], dtype: torch.dtype, repeats: int) -> Record:
    heads, length, columns = shape
    weight = torch.randn(heads, length, length, dtype=dtype, requires_grad=True)
    values = torch.randn(heads, length, columns, dtype=dtype, requires_grad=True)
    gradient = torch.randn(heads, length, columns, dtype=dtype)
    above = torch.ones(length, length, dtype=torch.bool).triu(1)

    def run(output: Tensor) -> None:
        torch.autograd.grad(output, (weight, values), gradient)

    return compare(
        f"masked dense {str(dtype)[6:]} E={heads} T={length} N={columns}",
        lambda: run(causal_mix(weight, values)),
        lambda: run(weight.masked_fill(above, 0) @ values),
        repeats=repeats,
    )


def _gated(hidden: Tensor, weight: Tensor, bias: Tensor, norm: torch.nn.LayerNorm) -> Tensor:
    """Return g-mlp-pytorch's causal gating unit on our product; hidden: <float>[T, B, D]."""
    length, batch, _ = hidden.shape
    heads = weight.shape[0]
    passed, gate = hidden.chunk(2, dim=-1)
    gate = F.layer_norm(gate, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    # [T, B, h, f] -> [h, T, B f]: the batch becomes more columns; with one head, nothing moves.
    columns = gate.unflatten(-1, (heads, -1)).permute(2, 0, 1, 3).reshape(heads, length, -1)
    mixed = causal_mix(weight, columns).add_(bias[:, :, None])
    mixed = mixed.unflatten(-1, (batch, -1)).permute(1, 2, 0, 3).flatten(2)
    return mixed * passed


def _bench_unit(shape: tuple[int, int, int, int], dtype: torch.dtype, repeats: int) -> Record:
    """Give each side its own layout, [T, B, D] or [B, T, D], as in a model built on it."""
    from g_mlp_pytorch.g_mlp_pytorch import SpatialGatingUnit

    batch, length, hidden, heads = shape
    unit = SpatialGatingUnit(hidden, length, causal=True, heads=heads).to(dtype)
    parameters = tuple(unit.parameters())
    theirs = torch.randn(batch, length, hidden, dtype=dtype, requires_grad=True)
    ours = theirs.detach().transpose(0, 1).contiguous().requires_grad_()
    gradient = torch.randn(batch, length, hidden // 2, dtype=dtype)
    our_gradient = gradient.transpose(0, 1).contiguous()

    def run_ours() -> Tensor:
        output = _gated(ours, unit.weight, unit.bias, unit.norm)
        torch.autograd.grad(output, (ours, *parameters), our_gradient)
        return output

    def run_theirs() -> Tensor:
        output = unit(theirs)
        torch.autograd.grad(output, (theirs, *parameters), gradient)
        return output

    # Rows are near 1 in size: compare within the precision's rounding before timing anything.
    torch.testing.assert_close(run_ours().transpose(0, 1), run_theirs(), rtol=2e-2, atol=2e-2)
    name = f"g-mlp-pytorch {str(dtype)[6:]} B={batch} T={length} D={hidden} h={heads}"
    return compare(name, run_ours, run_theirs, repeats=repeats)


def main() -> None:
    arguments = benchmark_parser(__doc__, repeats=15).parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    torch.manual_seed(0)
    records = [
        bench(shape, dtype, arguments.repeats)
        for bench, shapes in ((_bench_dense, DENSE_SHAPES), (_bench_unit, UNIT_SHAPES))
        for dtype in (torch.float32, torch.bfloat16)
        for shape in shapes
    ]
    report(records, arguments.json)


if __name__ == "__main__":
    main()
