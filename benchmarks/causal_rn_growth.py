"""How the cost of CausalRN's linear variant grows with T: processor time, forward and backward.

One sequence of T tokens, between the projections, which are linear in any case. The sizes take
turns, so that a slow phase of the machine falls on all of them; of each the smallest time counts,
which other work on the machine disturbs least. The exponent p of cost = a T^p is the slope of the
least squares line through the logarithms: 1 is linear.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from bench_mixers import running_sums

from megatron_smlp.platform.allocator import keep_freed_memory

LENGTHS = (512, 1024, 2048, 4096, 8192)
WIDTH = 256
"""F, features in which tokens are compared."""


def milliseconds(length: int) -> float:
    """Processor time of one pass."""
    start = time.process_time()
    running_sums(length, 1, WIDTH, torch.float32)
    return (time.process_time() - start) * 1e3


def exponent(lengths: Sequence[int], times: Sequence[float]) -> float:
    """p of time = a T^p."""
    slope, _ = statistics.linear_regression([*map(math.log, lengths)], [*map(math.log, times)])
    return slope


def measure(lengths: Sequence[int], repeats: int) -> list[float]:
    """The smallest milliseconds of each length, after one pass that is not counted."""
    for length in lengths:
        milliseconds(length)
    turns = [[milliseconds(length) for length in lengths] for _ in range(repeats)]
    return [min(times) for times in zip(*turns, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    times = measure(LENGTHS, arguments.repeats)
    slope = exponent(LENGTHS, times)
    for length, time_ms in zip(LENGTHS, times, strict=True):
        print(f"T {length:5}  {time_ms:8.2f} ms")
    print(f"exponent {slope:.2f}")
    if arguments.json is not None:
        figures = {"lengths": LENGTHS, "milliseconds": times, "exponent": slope}
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
