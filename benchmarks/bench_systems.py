"""Measure how much of the machine's GEMM speed a step of each system of configs/cpu reaches.

All systems have equal FLOPs. The peer is a yardstick: the time that the step's needed FLOPs (3 x
forward, causal products as triangles) would take at the speed of one large square GEMM in the same
precision, which alternates with our steps. The ratio is the share of that speed, and compares the
systems. Tokens per second are 4,096,000 / ms.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from hosted import ROOT, run, steps_in_turns
from timing import Record, paired

SYSTEMS = (
    "smlp_deterministic",
    "smlp_partial",
    "switch",
    "gshard",
    "base",
    "hash",
    "gmlp",
    "amlp",
    "transformer",
)
CASES = [f"{system} bf16" for system in SYSTEMS]
WIDTH, CALLS = 2048, 8
FLAGS = """
    --mock-data --tokenizer-type NullTokenizer --vocab-size 4095 --eval-iters 0 --log-interval 10
    --no-resume --bf16
"""


def yardstick() -> Callable[[], None]:
    """Return a function that runs CALLS bf16 GEMMs of WIDTH^3."""
    import torch

    left, right = (torch.randn(WIDTH, WIDTH, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(left)

    def multiply() -> None:
        for _ in range(CALLS):
            torch.mm(left, right, out=out)

    return multiply


def flops_per_step(args: argparse.Namespace) -> float:
    from megatron_smlp.accounting.costs import ModelShape, model_cost, training_flops_per_token

    shape = ModelShape.from_args(args)
    _, per_token = training_flops_per_token(model_cost(shape), shape)
    return per_token * float(args.global_batch_size * args.seq_length)


def flags(case: str) -> str:
    """Return the flags of a case."""
    return f"--config {ROOT}/configs/cpu/{case.split()[0]}.yaml {FLAGS}"


def measure(case: str, repeats: int) -> Record:
    flops: list[float] = []

    def peer(args: argparse.Namespace) -> Callable[[], None]:
        flops.append(flops_per_step(args))
        return yardstick()

    ours, gemms = steps_in_turns(flags(case), peer, repeats=repeats)
    share = flops[0] / (CALLS * 2 * WIDTH**3)
    return paired(case, ours, [share * milliseconds for milliseconds in gemms])


if __name__ == "__main__":
    run(__doc__, CASES, measure)
