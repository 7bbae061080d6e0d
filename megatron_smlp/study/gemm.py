"""Measure the speed of a large matrix product, which a training is compared with.

python -m megatron_smlp.study.gemm bfloat16   prints TFLOP/s of one process, and its threads
"""

from __future__ import annotations

import sys
import time

SIZE = {"cpu": 1024, "cuda": 8192}
REPEATS = 7


def main(dtype: str) -> None:
    """Print the speed of the fastest of some products of square matrices, and their threads."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = SIZE[device]
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    seconds = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        product = a @ b
        product[0, 0].item()  # it is there
        seconds.append(time.perf_counter() - begin)
    print(2 * size**3 / min(seconds) / 1e12, torch.get_num_threads())


if __name__ == "__main__":
    main(sys.argv[1])
