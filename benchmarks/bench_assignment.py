"""Time balanced assignment of N tokens to E experts against scipy's exact linear assignment.

Prints the times and `quality`, the share of the gap between a random balanced assignment and the
optimum that ours closes. scipy solves the same problem, one column per slot.
"""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from timing import Record, benchmark_parser, compare, report
from torch import Tensor

from megatron_smlp.ops.balanced_assignment import balanced_assignment

# The exact solution takes seconds from here on, minutes on larger clustered scores.
CASES = [
    ("random", (2048, 16)),
    ("random", (8192, 64)),
    ("clustered", (1024, 16)),
    ("clustered", (2048, 64)),
    ("identical", (8192, 64)),
]


def _scores(kind: str, num_tokens: int, num_experts: int) -> Tensor:
    if kind == "random":
        return torch.randn(num_tokens, num_experts)
    if kind == "identical":
        return torch.randn(1, num_experts).expand(num_tokens, num_experts)
    centres = 2.0 * torch.randn(12, 32)
    hidden = centres[torch.randint(12, (num_tokens,))] + 0.3 * torch.randn(num_tokens, 32)
    return hidden @ torch.randn(num_experts, 32).T / 6


def _exact(scores: Tensor) -> Tensor:
    share = scores.shape[0] // scores.shape[1]
    slots = np.repeat(scores.double().numpy(), share, axis=1)
    return torch.from_numpy(linear_sum_assignment(slots, maximize=True)[1] // share)


def _quality(scores: Tensor) -> float:
    def total(experts: Tensor) -> float:
        return scores.double().gather(1, experts[:, None]).sum().item()

    chance = scores.double().mean(dim=1).sum().item()
    return (total(balanced_assignment(scores)) - chance) / (total(_exact(scores)) - chance)


def _bench(kind: str, shape: tuple[int, int], repeats: int) -> Record:
    scores = _scores(kind, *shape)
    # Where all tokens are the same, every balanced assignment is optimal.
    quality = "" if kind == "identical" else f" quality={_quality(scores):.5f}"
    return compare(
        f"{kind} N={shape[0]} E={shape[1]}{quality}",
        lambda: balanced_assignment(scores),
        lambda: _exact(scores),
        repeats=repeats,
    )


def main() -> None:
    arguments = benchmark_parser(__doc__, repeats=3).parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    records = [_bench(kind, shape, arguments.repeats) for kind, shape in CASES]
    report(records, arguments.json)


if __name__ == "__main__":
    main()
