#!/usr/bin/env python3
"""Measure what ranks exchange besides gradients, in bytes and packets per rank, for 2 to 16 ranks.

    .venv/bin/python benchmarks/control_path.py

The kernel counts the bytes and packets that each rank's TCP connections send, acks included,
headers excluded (`ss`, of iproute2):

    start      the ranks connect: each finds the others' addresses in a store that rank 0 keeps
    step       Megatron's agreement on signals: 4 bytes from each rank, to all
    log line   each rank's part of a step and its machine's sending time, to all, and 64 KiB to a
               neighbor (training/slow_hosts.py); here each rank is a machine
    restart    causes and host names, to all

gloo sends all but the first around a ring, which loads all ranks equally; rank 0 is compared with
the others. The figures for 1,024 ranks are extrapolated from the measured points by a line, not
measured. At a start rank 0 sends what all n ranks have written to all: n^2 (154 + 8 n) bytes.
"""

import multiprocessing
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from megatron.training.dist_signal_handler import all_gather_item

from megatron_smlp.collectives import gathered
from megatron_smlp.training.slow_hosts import SlowHosts

SIZES = (2, 4, 8, 16)
FAR = 1024
TIMES = 20


def counters() -> tuple[int, int]:
    """Return the bytes and packets that this process has sent over its connections."""
    command = ["ss", "--tcp", "--info", "--processes", "--numeric", "--oneline", "--no-header"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    mine = [line for line in lines if f"pid={os.getpid()}," in line]
    sums = [
        sum(int(match[1]) for line in mine if (match := re.search(rf"\b{name}:(\d+)", line)))
        for name in ("bytes_sent", "segs_out")
    ]
    return sums[0], sums[1]


def restart() -> None:
    gathered(("rank 3 on node1 was ended by SIGKILL", 12.5))
    gathered(socket.gethostname())


def work(rank: int, size: int, port: int, results: "multiprocessing.Queue[object]") -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=size)
    socket.gethostname = lambda: f"node{rank:04d}"
    hosts = SlowHosts(timedelta(minutes=1))
    parts: dict[str, Callable[[], object]] = {
        "step": lambda: all_gather_item(0, dtype=torch.int32),
        "log line": lambda: hosts.find(0.1, step=0.2),
        "restart": restart,
    }
    sent = {"start": counters()}
    for name, part in parts.items():
        part()
        torch.distributed.barrier()
        before = counters()
        torch.distributed.barrier()  # nobody begins before all have read the counters
        for _ in range(TIMES):
            part()
        after = counters()
        sent[name] = tuple((b - a) / TIMES for a, b in zip(before, after, strict=True))
        torch.distributed.barrier()
    results.put((rank, sent))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


type Sent = tuple[float, float]  # bytes and packets


def measured(size: int) -> list[dict[str, Sent]]:
    """Return what each rank sent, by part."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [
        context.Process(target=work, args=(rank, size, 29600 + size, results))
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    by_rank = dict(results.get() for _ in ranks)
    for process in ranks:
        process.join()
    return [by_rank[rank] for rank in range(size)]


def far(sizes: Sequence[int], values: Sequence[float]) -> float:
    """Return the value of the least-squares line at FAR."""
    return float(np.polyval(np.polyfit(sizes, values, 1), FAR))


def main() -> None:
    by_size = {size: measured(size) for size in SIZES}
    print(f"a rank sends, bytes (packets); {FAR} is extrapolated")
    print(f"{'ranks':<30}" + "".join(f"{size:>18}" for size in (*SIZES, FAR)))
    for name in by_size[SIZES[0]][0]:
        for who, first, last in (("rank 0", 0, 1), ("the most of another", 1, None)):
            cells = [
                tuple(max(sent[name][at] for sent in by_size[size][first:last]) for at in (0, 1))
                for size in SIZES
            ]
            if (name, first) != ("start", 0):
                cells.append(tuple(far(SIZES, values) for values in zip(*cells, strict=True)))
            texts = [f"{sent:,.0f} ({packets:,.0f})" for sent, packets in cells]
            print(f"{name + ', ' + who:<30}" + "".join(f"{text:>18}" for text in texts))


if __name__ == "__main__":
    main()
