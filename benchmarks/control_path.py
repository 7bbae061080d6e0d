#!/usr/bin/env python3
"""What the ranks tell each other beside gradients, in bytes and packets a rank, for 2 to 16 ranks.

    unshare --net .venv/bin/python benchmarks/control_path.py

Counted on a loopback interface that nobody else uses (`unshare --net` gives one, as root), acks
and headers included:

    step       Megatron's agreement on signals: 4 bytes of each rank, to all
    log line   own parts of a step and ways out of the machines, to all, and 64 KiB to a neighbour
               (training/slow_hosts.py); here each rank is a machine
    restart    causes and host names, to all

gloo sends all of it around a ring, where no rank has more to do than another. What 1,024 ranks need
is extrapolated by a line through the measured points, and not measured.
"""

import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from megatron.training.dist_signal_handler import all_gather_item

from megatron_smlp.collectives import gathered
from megatron_smlp.training.slow_hosts import SlowHosts

SIZES = (2, 4, 8, 16)
FAR = 1024
TIMES = 20


def counters() -> tuple[int, int]:
    """Bytes and packets that the loopback interface has sent."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if "lo:" in line)
    numbers = line.partition(":")[2].split()
    return int(numbers[8]), int(numbers[9])


def restart() -> None:
    gathered(("rank 3 on node1 was ended by SIGKILL", 12.5))
    gathered(socket.gethostname())


def work(rank: int, size: int, port: int, results: "multiprocessing.Queue[object]") -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=size)
    socket.gethostname = lambda: f"node{rank:04d}"
    hosts = SlowHosts()
    parts: dict[str, Callable[[], object]] = {
        "step": lambda: all_gather_item(0, dtype=torch.int32),
        "log line": lambda: hosts.slow(0.1, step=0.2),
        "restart": restart,
    }
    for name, part in parts.items():
        part()
        torch.distributed.barrier()
        before = counters()
        torch.distributed.barrier()  # nobody begins before rank 0 has looked
        for _ in range(TIMES):
            part()
        torch.distributed.barrier()
        if rank == 0:
            after = counters()
            results.put(
                (name, *((b - a) / TIMES / size for a, b in zip(before, after, strict=True)))
            )
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def measured(size: int) -> dict[str, tuple[float, float]]:
    """Of each part: bytes and packets a rank."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [
        context.Process(target=work, args=(rank, size, 29600 + size, results))
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    found = [results.get() for _ in range(3)]
    for process in ranks:
        process.join()
    return {name: (sent, packets) for name, sent, packets in found}


def line_through(points: dict[int, float]) -> float:
    """The value at FAR, of least squares."""
    xs, ys = list(points), list(points.values())
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    slope = sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True))
    slope /= sum((a - x) ** 2 for a in xs)
    return y + slope * (FAR - x)


def main() -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    found = {size: measured(size) for size in SIZES}
    print(f"a rank sends, bytes (packets); {FAR} is extrapolated")
    print("ranks     " + "".join(f"{size:>16}" for size in (*SIZES, FAR)))
    for name in ("step", "log line", "restart"):
        cells = [found[size][name] for size in SIZES]
        far = tuple(line_through({size: found[size][name][at] for size in SIZES}) for at in (0, 1))
        texts = [f"{sent:,.0f} ({packets:,.0f})" for sent, packets in (*cells, far)]
        print(f"{name:<10}" + "".join(f"{text:>16}" for text in texts))


if __name__ == "__main__":
    main()
