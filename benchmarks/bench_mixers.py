"""The neighbouring mixers: masked mixers against masked dense ones, and CausalRN's growth with T.

`masked mixer`: LN, mixing, bias and residual, forward and backward, in our layout against the same
with a masked [T, T] weight and a batched matmul in [B, T, D], as an MLP-Mixer is made causal.

`CausalRN linear`: one sequence of 4 T tokens against four of T, the same number of tokens, without
the projections, which are linear in any case. A ratio of 1 is a cost that grows with T; the
exponent p of cost = a T^p follows from it.

`CausalRN quadratic`: the sum over pairs in blocks against the one with a [T, T, F] tensor.
"""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import Record, compare, report
from torch import Tensor, nn

from megatron_smlp.layers.norms import centred, normalised
from megatron_smlp.layers.spatial_gating import SpatialProjection
from megatron_smlp.ops.relation_mix import relation_mix, relation_mix_reference
from megatron_smlp.ops.running_sums import log_running_mean
from megatron_smlp.platform.allocator import keep_freed_memory

# (batch B, tokens T, hidden D, heads)
MIXERS = [(4, 512, 512, 1), (4, 1024, 512, 1), (4, 1024, 512, 4), (2, 2048, 512, 1)]
RUNNING = (1024, 256)  # T of the short sequences, F
PAIRS = (256, 64)  # T, F
TIMES = 4


class Masked(nn.Module):
    """The mixer as it is commonly written: mask, then multiply densely. [B, T, D] -> the same."""

    def __init__(self, spatial: SpatialProjection) -> None:
        super().__init__()
        self.spatial = spatial
        length = spatial.length
        self.register_buffer("above", torch.ones(length, length, dtype=torch.bool).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        heads = len(self.spatial.weight)
        values = F.layer_norm(x, x.shape[-1:]).unflatten(-1, (heads, -1)).transpose(1, 2)
        mixed = self.spatial.weight.masked_fill(self.above, 0) @ values
        mixed = mixed + self.spatial.bias[..., None]
        return x + mixed.transpose(1, 2).flatten(2)


def masked_mixer(shape: tuple[int, int, int, int], dtype: torch.dtype, repeats: int) -> Record:
    batch, length, hidden, heads = shape
    spatial = SpatialProjection(heads, length=length, dtype=dtype)
    masked, parameters = Masked(spatial), tuple(spatial.parameters())
    theirs = torch.randn(batch, length, hidden, dtype=dtype, requires_grad=True)
    ours = theirs.detach().transpose(0, 1).contiguous().requires_grad_()

    def run_ours() -> None:
        normed = F.layer_norm(ours, ours.shape[-1:])
        output = ours + spatial.mixed(normed, *spatial())
        torch.autograd.grad(output, (ours, *parameters), torch.ones_like(output))

    def run_theirs() -> None:
        output = masked(theirs)
        torch.autograd.grad(output, (theirs, *parameters), torch.ones_like(output))

    name = f"masked mixer {str(dtype)[6:]} B={batch} T={length} D={hidden} heads={heads}"
    return compare(name, run_ours, run_theirs, repeats=repeats)


def running_sums(tokens: int, batch: int, width: int, dtype: torch.dtype) -> None:
    """What CausalRN's linear variant does between its projections, forward and backward."""
    a, b = torch.randn(2, tokens, batch, width, dtype=dtype).requires_grad_().unbind()
    exponents = normalised(a, eps=1e-5) + log_running_mean(normalised(b, eps=1e-5))
    largest = exponents.detach().amax(dim=-1, keepdim=True)
    normalised((exponents - largest).exp(), eps=1e-5).sum().backward()


def linear_growth(dtype: torch.dtype, repeats: int) -> Record:
    length, width = RUNNING
    record = compare(
        f"CausalRN linear {str(dtype)[6:]} T={TIMES * length} against {TIMES} x {length}",
        lambda: running_sums(TIMES * length, 1, width, dtype),
        lambda: running_sums(length, TIMES, width, dtype),
        repeats=repeats,
    )
    exponent = 1 - math.log(record["ratio"], TIMES)
    record["case"] += f", exponent {exponent:.2f}"
    return record


def blocked_pairs(repeats: int) -> Record:
    length, width = PAIRS
    a, b = (centred(torch.randn(length, 1, width), None).requires_grad_() for _ in range(2))
    r = torch.rand(1, length, length, requires_grad=True)

    def run(output: Tensor) -> None:
        torch.autograd.grad(output.sum(), (a, b, r))

    return compare(
        f"CausalRN quadratic float32 T={length} F={width} against all pairs at once",
        lambda: run(relation_mix(a, b, r)),
        lambda: run(relation_mix_reference(a, b, r)),
        repeats=repeats,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, help="of torch (default: all)")
    parser.add_argument("--json", type=Path, help="also write the records there")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    dtypes = (torch.float32, torch.bfloat16)
    records = [masked_mixer(s, d, arguments.repeats) for d in dtypes for s in MIXERS]
    records += [linear_growth(dtype, arguments.repeats) for dtype in dtypes]
    records.append(blocked_pairs(arguments.repeats))
    report(records, arguments.json)


if __name__ == "__main__":
    main()
