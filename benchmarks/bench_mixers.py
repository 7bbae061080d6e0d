"""Time masked mixers against masked dense ones.

LN, mixing, bias and residual, forward and backward, in our layout against the same with a masked
[T, T] weight and a batched matmul in [B, T, D], as an MLP-Mixer is made causal.
"""

import torch
import torch.nn.functional as F
from timing import Record, benchmark_parser, compare, report
from torch import Tensor, nn

from megatron_smlp.layers.spatial_gating import SpatialProjection
from megatron_smlp.platform.allocator import keep_freed_memory

# (batch B, tokens T, hidden D, heads)
MIXERS = [(4, 512, 512, 1), (4, 1024, 512, 1), (4, 1024, 512, 4), (2, 2048, 512, 1)]


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


def main() -> None:
    arguments = benchmark_parser(__doc__, repeats=15).parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    dtypes = (torch.float32, torch.bfloat16)
    records = [masked_mixer(s, d, arguments.repeats) for d in dtypes for s in MIXERS]
    report(records, arguments.json)


if __name__ == "__main__":
    main()
