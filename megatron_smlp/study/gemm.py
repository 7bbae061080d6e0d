"""Measure the speed of a large matrix product, as a reference for training speed.

python -m megatron_smlp.study.gemm bfloat16   prints TFLOP/s and number of threads of one process
"""

from __future__ import annotations

import sys
import time

SIZE = {"cpu": 1024, "cuda": 8192}
REPEATS = 7


def main(dtype: str) -> None:
    """Print the TFLOP/s of the fastest of REPEATS square matrix products, and the thread count."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = SIZE[device]
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    seconds = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        product = a @ b
        product[0, 0].item()  # wait for the result
        seconds.append(time.perf_counter() - begin)
    print(2 * size**3 / min(seconds) / 1e12, torch.get_num_threads())


if __name__ == "__main__":
    main(sys.argv[1])
